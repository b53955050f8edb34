"""The parts of a loaded model as the C++ decoder step takes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from subnibble.arch import find_arch
from subnibble.arch.site import Arch, Heads, Role, Site
from subnibble.checkpoint.module_specs import KEY_CENTER, PREFIX
from subnibble.errors import UnsupportedModel
from subnibble.hf.linear_parts import DTYPES, LinearParts
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

# As in cpp/step/functions.h.
_GATES = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
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

    model: a loaded transformers model.
    fixed_bytes: see `LinearParts`.
    """

    def __init__(self, model: Any, fixed_bytes: int) -> None:
        self.model, self._linears = model, LinearParts(fixed_bytes)
        self.config = model.config
        self.arch: Arch = find_arch(self.config.model_type)
        self.heads = Heads.of(self.config)
        self.decoder: Any = model.get_submodule(self.arch.blocks.rpartition(".")[0])
        self.num_layers = len(model.get_submodule(self.arch.blocks))
        self.prefix_tokens = 0

    @property
    def held(self) -> list[object]:
        """What addresses in the C++ decoder point to."""
        return self._linears.held

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
            self._linears.runs(rotation),
            self.prefix_tokens,
            self._table(self.model.get_submodule(self.arch.embedding)),
            [self._layer(block, scheme) for block in blocks],
            self._norm(self.model.get_submodule(self.arch.final_norm)),
            self._head(head),
        )
        if matrix := getattr(head, HEAD_INPUT, None):
            self._linears.used.add(id(matrix))
            native_decoder.set_head_input(self._linears.address(matrix.matrix), list(matrix.widths))
        for index, prefix in enumerate(prefixes):
            if prefix is not None:
                self._linears.used.add(id(prefix))
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
            self._linears.used.add(id(center))
            if scheme is not None and scheme.is_centered:
                layer.key_center = self._linears.address(center.held().float())
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
                sites.append(self._linears.site(steps, int(reader.in_features)))
                counts.append(0)
            sites[at].reader(self._linears.terms(reader, steps))
            places.append((at, counts[at]))
            counts[at] += 1
        return sites, places

    def _head(self, head: Any) -> Any:
        if isinstance(head, TiedHead):
            self._linears.used.add(id(head))
            steps = SiteInput(activation=head.activation)
            site = self._linears.site(steps, head.in_features)
            site.reader(self._linears.packed_terms(PackedWeight(head.embedding.packed), steps))
            return site
        steps = head.linear.input if isinstance(head, PackedLinear) else SiteInput()
        site = self._linears.site(steps, int(head.in_features))
        site.reader(self._linears.terms(head, steps))
        return site

    def _table(self, embedding: nn.Module) -> Any:
        self._linears.used.add(id(embedding))
        if isinstance(embedding, PackedEmbedding):
            table = kernels.module.Table(embedding.num_embeddings, embedding.embedding_dim)
            packed: PackedTensor = embedding.packed
            for part in packed.ranges:
                form = native.form(kernels.isa(), part.scheme, embedding.num_embeddings, part.num_columns)
                zeros = 0 if part.zeros is None else self._linears.address(part.zeros)
                table.packed(form, self._linears.address(part.codes), self._linears.address(part.scales), zeros)
            return table
        assert isinstance(embedding, nn.Embedding)
        table = kernels.module.Table(embedding.num_embeddings, embedding.embedding_dim)
        table.dense(self._linears.address(embedding.weight.detach()), DTYPES[embedding.weight.dtype])
        return table

    def _norm(self, norm: nn.Module | None) -> tuple[int, int, float]:
        """(address of the gain, address of the bias or 0, eps); the first is 0 for no norm."""
        if norm is None:
            return 0, 0, 0.0
        self._linears.used.add(id(norm))
        bias: Any = getattr(norm, "bias", None)
        gain: Any = norm.weight
        address = self._linears.address(gain.detach().float())
        return address, 0 if bias is None else self._linears.address(bias.detach().float()), norm_eps(norm)

    def _check_all_used(self) -> None:
        """Raise `UnsupportedModel` if a module with tensors is not a part of the C++ decoder."""
        for path, module in self.model.named_modules():
            own = (*module.parameters(recurse=False), *module.named_buffers(recurse=False))
            if own and id(module) not in self._linears.used and module is not Angles.of(self.decoder).module:
                raise UnsupportedModel(
                    f"the native decoder step does not know {path}, a {type(module).__name__}; use the torch backend"
                )
