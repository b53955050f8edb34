"""Run a loaded model by the C++ decoder step: built from the site tables, one call for all tokens of a step.

The decoder shares the packed weights of the model's linears, which are repacked once for both. Hidden states are
float32. Inputs of linears without an activation scheme are rounded to fixed point, as `runtime/native.py` rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.arch import find_arch
from subnibble.arch.site import Arch, Heads, Role, Site
from subnibble.checkpoint.module_specs import KEY_CENTER, PREFIX
from subnibble.errors import BadRecipe, UnsupportedModel
from subnibble.hf.attention import attached_cache
from subnibble.kernels import native as kernels
from subnibble.model.transformers_api.decoder import (
    Angles,
    gate_name,
    head_norms,
    norm_eps,
    score_factor,
    sliding_window,
)
from subnibble.runtime import native
from subnibble.runtime.modules import HEAD_INPUT, PackedEmbedding, PackedLinear, TiedHead
from subnibble.runtime.offloaded import has_hook
from subnibble.tensor import hadamard
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.linear import PackedWeight, SiteInput
from subnibble.tensor.packed import PackedTensor, pack_codes, unpack_codes

# As in cpp/step/functions.h.
_GATES = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Roles of a layer's tensors, in the order of its five named readers.
_READERS = (Role.ATTENTION_IN, Role.MLP_IN)
_KINDS = {"keys": True, "values": False}
# Positions whose cosines and sines are computed at first.
_FIRST_POSITIONS = 2048


def why_not(model: Any) -> str | None:
    """Why the decoder step cannot run a model, in a few words; None if it can."""
    if reason := kernels.why_missing():
        return reason
    if kernels.isa() == kernels.TORCH:
        return "torch operations were chosen"
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return "a part of the model is not on the CPU"
    if any(has_hook(module) for module in model.modules()):
        return "a part of the model is offloaded"
    if gate_name(model.config) is None:
        return f"no kernel for the activation function {getattr(model.config, 'hidden_act', None)!r}"
    heads = Heads.of(model.config)
    if heads.width > 256 or heads.width % 2:
        return f"no kernel for heads of {heads.width} channels"
    return None


class Decoder:
    """A model that runs by the C++ decoder step.

    model: a loaded transformers model; its modules must not change afterwards.
    fixed_bytes: bytes of the fixed-point numbers of inputs without a scheme: 2 or 3. None: 3 for float32 models, else 2.
    Raises `UnsupportedModel` if the step cannot run the model.
    """

    def __init__(self, model: Any, fixed_bytes: int | None = None) -> None:
        if reason := why_not(model):
            raise UnsupportedModel(f"the native decoder step cannot run this model: {reason}")
        self.vocab_size = int(model.config.vocab_size)
        attached = attached_cache(model)
        self.scheme: CacheScheme | None = None if attached is None else attached.scheme
        self.prefix = None if attached is None else attached.prefix
        builder = _Builder(model, fixed_bytes or (3 if model.dtype == torch.float32 else 2))
        self._angles = Angles.of(builder.decoder)
        self._native = builder.build(self._angles.read(0, 1)[0].shape[1], self.scheme)
        # What addresses in the C++ object point to.
        self._held = builder.held
        self._positions = 0
        self._prefix_tokens = builder.prefix_tokens
        self._heads, self._layers = builder.heads, len(model.get_submodule(builder.arch.blocks))

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences' keys and values."""
        return int(self._native.nbytes)

    def open(self) -> Any:
        """A new empty sequence, which has `length`, `crop`, `save` and `load`."""
        return self._native.open()

    def forward(self, sequences: Sequence[Any], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to sequences; returns the logits after each one's last token, (b, vocab_size) float32.

        sequences: of `open`, each once.
        tokens: token ids for each, at least one.
        """
        logits = torch.empty(len(sequences), self.vocab_size)
        if self._angles.changes and len(sequences) > 1:
            # Frequencies depend on the length of one text.
            for row, pair in enumerate(zip(sequences, tokens, strict=True)):
                self._run([(*pair, False)], logits[row : row + 1])
        else:
            self._run([(sequence, ids, False) for sequence, ids in zip(sequences, tokens, strict=True)], logits)
        return logits

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits after each token of a text of its own: (t, vocab_size) float32."""
        logits = torch.empty(len(tokens), self.vocab_size)
        self._run([(self.open(), tokens, True)], logits)
        return logits

    def save(self, sequence: Any) -> dict[str, Tensor]:
        """Copies of a sequence's keys and values, as `generate/backend.py` describes them."""
        state: dict[str, Tensor] = {}
        for layer in range(self._layers):
            for kind, of_keys in _KINDS.items():
                tensors = self._empty_state(sequence.length, of_keys)
                sequence.read(layer, of_keys, *(tensor.data_ptr() for tensor in tensors.values()))
                for name, tensor in tensors.items():
                    if tensor.numel():
                        stored = _packed_rows(tensor, self.scheme, of_keys) if name == "codes" else tensor
                        state[f"layers.{layer}.{kind}.{name}"] = stored
        return state

    def load(self, state: Mapping[str, Tensor]) -> Any:
        """A new sequence with the keys and values that `save` returned."""
        sequence, heads, width = self.open(), self._heads.key_value, self._heads.width
        codes, exact = (state.get(f"layers.0.values.{name}") for name in ("codes", "exact"))
        tokens = sum(int(tensor.shape[1]) for tensor in (codes, exact) if tensor is not None)
        sequence.reserve(tokens)
        if self.scheme is not None and self.scheme.rope == "before":
            if self._angles.changes:
                raise BadRecipe("positions of this model depend on the length of the text: its keys cannot be loaded")
            cos, sin = self._angles.read(self._prefix_tokens, self._prefix_tokens + tokens)
            sequence.place_angles(cos.data_ptr(), sin.data_ptr(), tokens, cos.shape[1])
        for layer in range(self._layers):
            for kind, of_keys in _KINDS.items():
                tensors = self._empty_state(tokens, of_keys)
                for name, empty in tensors.items():
                    stored = state.get(f"layers.{layer}.{kind}.{name}")
                    if empty.numel() and stored is None:
                        raise BadRecipe(f"the saved sequence lacks layers.{layer}.{kind}.{name}")
                    if empty.numel() and stored is not None:
                        is_codes = name == "codes"
                        dense = _unpacked_rows(stored, self.scheme, width, of_keys) if is_codes else stored.to(empty.dtype)
                        if dense.shape != empty.shape:
                            raise BadRecipe(
                                f"layers.{layer}.{kind}.{name} of the saved sequence has shape {tuple(dense.shape)}, "
                                f"but this model stores {tuple(empty.shape)} ({heads} heads of {width} channels)"
                            )
                        tensors[name] = dense.contiguous()
                sequence.write(layer, of_keys, *(tensor.data_ptr() for tensor in tensors.values()))
        sequence.advance(tokens)
        return sequence

    def _empty_state(self, tokens: int, of_keys: bool) -> dict[str, Tensor]:
        """Empty tensors for the keys or values of one layer; codes are not packed, channels side by side."""
        scheme, heads, width = self.scheme, self._heads.key_value, self._heads.width
        coded = 0 if scheme is None else scheme.quantized_tokens(tokens, of_keys)
        exact = torch.empty(heads, tokens - coded, width, dtype=torch.float16)
        if scheme is None:
            none = torch.empty(0, dtype=torch.float16)
            return {"codes": torch.empty(0, dtype=torch.uint8), "scales": none, "lows": none, "exact": exact}
        if of_keys and scheme.key_axis == "channel":
            groups = coded // scheme.group_size
            codes, scales = (heads, groups, scheme.group_size, width), (heads, groups, width, 1)
        else:
            codes, scales = (heads, coded, width), (heads, coded, len(scheme.bounds(width)))
        numbers = (torch.empty(scales, dtype=torch.float16) for _ in range(2))
        return {"codes": torch.empty(codes, dtype=torch.uint8), **dict(zip(("scales", "lows"), numbers, strict=True)),
                "exact": exact}  # fmt: skip

    def _run(self, appends: list[tuple[Any, Sequence[int], bool]], logits: Tensor) -> None:
        ends = [self._prefix_tokens + sequence.length + len(ids) for sequence, ids, _ in appends]
        self._prepare_positions(min(end - len(ids) for end, (_, ids, _) in zip(ends, appends, strict=True)), max(ends))
        arguments = [(sequence, list(ids), all_logits) for sequence, ids, all_logits in appends]
        self._native.forward(arguments, torch.get_num_threads(), logits.data_ptr())

    def _prepare_positions(self, start: int, stop: int) -> None:
        """Give the step cosines and sines of positions start .. stop - 1."""
        if stop > self._positions:
            self._positions = max(stop, 2 * self._positions, _FIRST_POSITIONS)
            known = min(self._positions, _FIRST_POSITIONS) if self._angles.changes else self._positions
            cos, sin = self._angles.read(0, known)
            if known < self._positions:
                cos, sin = (torch.cat([half, half.new_empty(self._positions - known, half.shape[1])]) for half in (cos, sin))
            self._table = cos, sin
            self._native.set_angles(cos.data_ptr(), sin.data_ptr(), self._positions)
        if self._angles.changes:
            for half, new in zip(self._table, self._angles.read(start, stop), strict=True):
                half[start:stop] = new


def cache_rules(scheme: CacheScheme | None, heads: int, width: int) -> Any:
    """A cache scheme for `heads` key-value heads of `width` channels, as the C++ step takes it."""
    if scheme is None:
        return kernels.module.Cache(heads, width, 16, width, False, 0, 1.0, False)
    group = width if scheme.group_size == -1 else scheme.group_size
    by_channel, before_rope = scheme.key_axis == "channel", scheme.rope == "before"
    return kernels.module.Cache(heads, width, scheme.bits, group, by_channel, scheme.window, scheme.clip, before_rope)


def _packed_rows(codes: Tensor, scheme: CacheScheme | None, of_keys: bool) -> Tensor:
    """Pack codes (heads, tokens, width), or keys by channel (heads, groups, tokens of a group, width), row by row."""
    assert scheme is not None
    rows = codes.transpose(2, 3) if of_keys and scheme.key_axis == "channel" else codes
    return pack_codes(rows.flatten(0, -2), scheme.bits).view(*rows.shape[:-1], -1)


def _unpacked_rows(packed: Tensor, scheme: CacheScheme | None, width: int, of_keys: bool) -> Tensor:
    """Inverse of `_packed_rows`."""
    assert scheme is not None
    by_channel = of_keys and scheme.key_axis == "channel"
    columns = scheme.group_size if by_channel else width
    rows = unpack_codes(packed.flatten(0, -2), scheme.bits, columns).view(*packed.shape[:-1], columns)
    return rows.transpose(2, 3) if by_channel else rows


class _Builder:
    """Collects a model's parts for the C++ decoder, and checks that none is left out."""

    def __init__(self, model: Any, fixed_bytes: int) -> None:
        self.model, self.fixed_bytes = model, fixed_bytes
        self.config = model.config
        self.arch: Arch = find_arch(self.config.model_type)
        self.heads = Heads.of(self.config)
        self.decoder: Any = model.get_submodule(self.arch.blocks.rpartition(".")[0])
        self.held: list[object] = []
        self.prefix_tokens = 0
        self._used: set[int] = set()

    def build(self, angles: int, scheme: CacheScheme | None) -> Any:
        """The C++ decoder. angles: rotated channels / 2."""
        module = kernels.module
        blocks = list(self.model.get_submodule(self.arch.blocks))
        attentions = [block.get_submodule(self.arch.attention) for block in blocks]
        prefixes = [getattr(attention, PREFIX, None) for attention in attentions]
        self.prefix_tokens = 0 if prefixes[0] is None else int(prefixes[0].keys.shape[1])
        rotation = () if scheme is None or scheme.key_rotation == "none" else hadamard.hadamard_blocks(self.heads.width)
        head = self.model.get_submodule(self.arch.head)
        native_decoder = module.Decoder(
            kernels.isa(),
            int(self.config.hidden_size),
            self.heads.query,
            angles,
            score_factor(attentions[0], self.heads.width),
            _GATES[str(gate_name(self.config))],
            cache_rules(scheme, self.heads.key_value, self.heads.width),
            self._runs(rotation),
            self.prefix_tokens,
            self._table(self.model.get_submodule(self.arch.embedding)),
            [self._layer(block, scheme) for block in blocks],
            self._norm(self.model.get_submodule(self.arch.final_norm)),
            self._head(head),
        )
        if matrix := getattr(head, HEAD_INPUT, None):
            self._used.add(id(matrix))
            native_decoder.set_head_input(self._address(matrix.matrix), list(matrix.widths))
        for index, prefix in enumerate(prefixes):
            if prefix is not None:
                self._used.add(id(prefix))
                keys, values = (states.float() for states in prefix.pair())
                keys = hadamard.multiply(keys, rotation) if rotation else keys
                native_decoder.set_prefix(index, self._address(keys), self._address(values))
        self._check_all_used()
        return native_decoder

    def _layer(self, block: nn.Module, scheme: CacheScheme | None) -> Any:
        layer, attention = kernels.module.Layer(), block.get_submodule(self.arch.attention)
        tensors = {}
        for site in self.arch.sites:
            tensors[site.name] = self._tensor(block, site)
            setattr(layer, site.name.value, tensors[site.name][0])
        layer.places = [place for role in _READERS for place in tensors[role][1]]
        for role, name in ((Role.ATTENTION_IN, "attention_norm"), (Role.MLP_IN, "mlp_norm")):
            setattr(layer, name, self._norm(block.get_submodule(str(self.arch.site(role).norm))))
        query, key = head_norms(attention) or (None, None)
        layer.query_norm, layer.key_norm = self._norm(query), self._norm(key)
        layer.window = sliding_window(attention, self.config)
        center = getattr(attention, KEY_CENTER, None)
        if center is not None:
            self._used.add(id(center))
            if scheme is not None and scheme.is_centered:
                layer.key_center = self._address(center.held().float())
        return layer

    def _tensor(self, block: nn.Module, site: Site) -> tuple[list[Any], list[tuple[int, int]]]:
        """The C++ sites of a tensor, one for each set of steps, and the place of each reader in them."""
        sites: list[Any] = []
        counts: list[int] = []
        index_of: dict[object, int] = {}
        places = []
        for name in site.readers:
            reader = block.get_submodule(name)
            steps = reader.linear.input if isinstance(reader, PackedLinear) else SiteInput()
            key: object = type(reader) if steps.is_plain else id(reader.input)
            if key not in index_of:
                index_of[key] = len(sites)
                sites.append(self._site(steps, int(reader.in_features)))
                counts.append(0)
            at = index_of[key]
            sites[at].reader(self._terms(reader, steps))
            places.append((at, counts[at]))
            counts[at] += 1
        return sites, places

    def _site(self, steps: SiteInput, width: int) -> Any:
        return kernels.module.Site(
            width,
            0 if steps.column_scale is None else self._address(steps.column_scale.float()),
            0 if steps.gather is None else self._address(steps.gather.long()),
            self._runs(steps.blocks),
            native.rounding(kernels.isa(), steps.activation, self.fixed_bytes),
            steps.requantized if steps.activation is not None else 0,
        )

    def _terms(self, module: nn.Module, steps: SiteInput) -> Any:
        """A linear's terms: packed, or dense of an `nn.Linear`."""
        self._used.update(id(child) for child in module.modules())
        if isinstance(module, PackedLinear):
            return self._packed_terms(module.linear.weight, steps)
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(f"the native decoder step cannot run a {type(module).__name__}")
        terms = kernels.module.Terms(module.out_features)
        terms.dense(self._address(module.weight.detach()), _DTYPES[module.weight.dtype])
        if module.bias is not None:
            terms.bias(self._address(module.bias.detach().float()))
        return terms

    def _packed_terms(self, weight: PackedWeight, steps: SiteInput) -> Any:
        terms = kernels.module.Terms(weight.main.shape[0])
        down, up = weight.low_rank or (None, None)
        for add, matrix in ((terms.main, weight.main), (terms.salient, weight.salient), (terms.down, down), (terms.up, up)):
            start = 0
            for part in () if matrix is None else matrix.ranges:
                repacked = native.repacked(part)
                self.held.append(repacked)
                add(repacked, start)
                start += part.num_columns
        # There are no outlier channels between the low-rank factors.
        inner = None if steps.activation is None else steps.activation.without_outliers
        terms.inner(native.rounding(kernels.isa(), inner, self.fixed_bytes))
        if weight.bias is not None:
            terms.bias(self._address(weight.bias.detach().float()))
        return terms

    def _head(self, head: nn.Module) -> Any:
        if isinstance(head, TiedHead):
            self._used.add(id(head))
            steps = SiteInput(activation=head.activation)
            site = self._site(steps, head.in_features)
            site.reader(self._packed_terms(PackedWeight(head.embedding.packed), steps))
            return site
        steps = head.linear.input if isinstance(head, PackedLinear) else SiteInput()
        site = self._site(steps, int(head.in_features))  # type: ignore[call-overload]
        site.reader(self._terms(head, steps))
        return site

    def _table(self, embedding: nn.Module) -> Any:
        self._used.add(id(embedding))
        if isinstance(embedding, PackedEmbedding):
            table = kernels.module.Table(embedding.num_embeddings, embedding.embedding_dim)
            packed: PackedTensor = embedding.packed
            for part in packed.ranges:
                form = native.form(kernels.isa(), part.scheme, embedding.num_embeddings, part.num_columns)
                zeros = 0 if part.zeros is None else self._address(part.zeros)
                table.packed(form, self._address(part.codes), self._address(part.scales), zeros)
            return table
        assert isinstance(embedding, nn.Embedding)
        table = kernels.module.Table(embedding.num_embeddings, embedding.embedding_dim)
        table.dense(self._address(embedding.weight.detach()), _DTYPES[embedding.weight.dtype])
        return table

    def _norm(self, norm: nn.Module | None) -> tuple[int, int, float]:
        """(address of the gain, address of the bias or 0, eps); the first is 0 for no norm."""
        if norm is None:
            return 0, 0, 0.0
        self._used.add(id(norm))
        bias: Any = getattr(norm, "bias", None)
        gain: Any = norm.weight
        address = self._address(gain.detach().float())
        return address, 0 if bias is None else self._address(bias.detach().float()), norm_eps(norm)

    def _runs(self, blocks: tuple[int, ...]) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Adjacent blocks of one order: (order, count, [(order of a factor, its address)])."""
        runs = []
        for order, count in hadamard.runs(blocks):
            factors = [(matrix.shape[0], self._address(matrix)) for matrix in hadamard.stage_matrices(order)]
            runs.append((order, count, factors))
        return runs

    def _address(self, tensor: Tensor) -> int:
        """The address of a tensor, which is held from now on."""
        dense = tensor.contiguous()
        self.held.append(dense)
        return dense.data_ptr()

    def _check_all_used(self) -> None:
        """Raise `UnsupportedModel` if a module with tensors is not a part of the C++ decoder."""
        for path, module in self.model.named_modules():
            own = (*module.parameters(recurse=False), *module.named_buffers(recurse=False))
            if own and id(module) not in self._used and module is not Angles.of(self.decoder).module:
                raise UnsupportedModel(
                    f"the native decoder step does not know {path}, a {type(module).__name__}; use the torch backend"
                )

