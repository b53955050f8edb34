"""The parts of a loaded model as the C++ decoder step takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subnibble.arch import find_arch
from subnibble.arch.site import Arch, Heads, Role, Site
from subnibble.checkpoint.module_specs import KEY_CENTER, PREFIX
from subnibble.errors import UnsupportedModel
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
from subnibble.tensor import hadamard
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.linear import PackedWeight, SiteInput
from subnibble.tensor.packed import PackedTensor

# As in cpp/step/functions.h and cpp/matrix.h.
_GATES = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Tensors whose readers a layer names, in the order of their names: query, key, value; gate, up.
_READERS = (Role.ATTENTION_IN, Role.MLP_IN)


def cache_rules(scheme: CacheScheme | None, heads: int, width: int) -> Any:
    """A cache scheme for `heads` key-value heads of `width` channels, as the C++ step takes it."""
    if scheme is None:
        return kernels.module.Cache(heads, width, 16, width, False, 0, 1.0, False)
    group = width if scheme.group_size == -1 else scheme.group_size
    by_channel, before_rope = scheme.key_axis == "channel", scheme.rope == "before"
    return kernels.module.Cache(heads, width, scheme.bits, group, by_channel, scheme.window, scheme.clip, before_rope)


class DecoderParts:
    """Collects a model's parts for the C++ decoder, and checks that none is left out.

    held: what addresses in the C++ decoder point to.
    """

    def __init__(self, model: Any, fixed_bytes: int) -> None:
        self.model, self.fixed_bytes = model, fixed_bytes
        self.config = model.config
        self.arch: Arch = find_arch(self.config.model_type)
        self.heads = Heads.of(self.config)
        self.decoder: Any = model.get_submodule(self.arch.blocks.rpartition(".")[0])
        self.num_layers = len(model.get_submodule(self.arch.blocks))
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
                # The step copies them.
                keys, values = keys.contiguous(), values.contiguous()
                native_decoder.set_prefix(index, keys.data_ptr(), values.data_ptr())
        self._check_all_used()
        return native_decoder

    def _layer(self, block: nn.Module, scheme: CacheScheme | None) -> Any:
        layer, attention = kernels.module.Layer(), block.get_submodule(self.arch.attention)
        tensors = {}
        for site in self.arch.sites:
            tensors[site.name] = self._tensor(block, site)
            setattr(layer, site.name, tensors[site.name][0])
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
        known: list[SiteInput] = []
        places = []
        for name in site.readers:
            reader: Any = block.get_submodule(name)
            steps = reader.linear.input if isinstance(reader, PackedLinear) else SiteInput()
            at = next((index for index, other in enumerate(known) if other.same_as(steps)), len(known))
            if at == len(known):
                known.append(steps)
                sites.append(self._site(steps, int(reader.in_features)))
                counts.append(0)
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
        for add, matrix in (
            (terms.main, weight.main),
            (terms.salient, weight.salient),
            (terms.down, down),
            (terms.up, up),
        ):
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

    def _head(self, head: Any) -> Any:
        if isinstance(head, TiedHead):
            self._used.add(id(head))
            steps = SiteInput(activation=head.activation)
            site = self._site(steps, head.in_features)
            site.reader(self._packed_terms(PackedWeight(head.embedding.packed), steps))
            return site
        steps = head.linear.input if isinstance(head, PackedLinear) else SiteInput()
        site = self._site(steps, int(head.in_features))
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
