"""Turn a rounded block into the tensors and specs that the checkpoint stores.

Column scales are absorbed upstream. A channel order of an input is folded into the rows of the upstream weights, or
stored as a gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.checkpoint.module_specs import (
    KEY_CENTER,
    KeyCenterSpec,
    NormBiasSpec,
    PrefixSpec,
    Spec,
    gather_type,
    linear_spec,
    linear_state,
    prefix_state,
)
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.round import RoundedBlock
from subnibble.report import BlockReport, LinearReport
from subnibble.rounding.table import as_stored
from subnibble.tensor.linear import Linear
from subnibble.transforms.absorb import absorb_
from subnibble.transforms.prefix_basis import stored_center, stored_states
from subnibble.transforms.saliency import offline_rows


@dataclass(frozen=True)
class StoredBlock:
    """What the checkpoint and the report store of a block.

    tensors: name in the checkpoint -> tensor in its stored dtype.
    specs: module path -> spec, of packed modules.
    linears: report of each quantized linear.
    tuned: report of the block's tuning, or None.
    """

    tensors: Mapping[str, Tensor]
    specs: Mapping[str, Spec]
    linears: tuple[LinearReport, ...]
    tuned: BlockReport | None = None

    def without_tensors(self) -> StoredBlock:
        """A copy without tensors, to keep after they are on disk."""
        return replace(self, tensors={})


def store(rounded: RoundedBlock, resolved: Resolved, tuned: BlockReport | None = None) -> StoredBlock:
    """Build the tensors, specs and reports of a rounded block. tuned: report of the block's tuning, or None."""
    block, path = rounded.block, rounded.block.path
    terms, exact = _absorbed(rounded)
    terms, exact, row_orders = _ordered(rounded, terms, exact)
    inputs = {name: first for site in block.arch.sites for name, first in shared_inputs(site, terms).items()}
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    linears = []
    edited = _edited(rounded, resolved.steps)
    for name, term in terms.items():
        first = inputs.get(name)
        linear = replace(term, weight=replace(term.weight, bias=exact.get(f"{name}.bias")))
        spec = linear_spec(linear, None if first is None else f"{path}.{first}")
        specs[f"{path}.{name}"] = spec
        state = {key: tensor for key, tensor in linear_state(linear).items() if key not in spec.elsewhere}
        tensors |= {f"{path}.{name}.{key}": tensor for key, tensor in state.items()}
        bits = spec.stored_bits / (spec.layout.rows * spec.layout.num_columns)
        linears.append(replace(rounded.linears[name], effective_bits=bits, basis_changed=name in edited))
    tensors |= {f"{path}.{name}": tensor for name, tensor in exact.items() if name.removesuffix(".weight") not in terms}
    for site in block.arch.sites:
        if site.norm is not None and f"{site.norm}.bias" in exact:
            bias = exact[f"{site.norm}.bias"].to(torch.float16)
            tensors[f"{path}.{site.norm}.bias"] = bias
            specs[f"{path}.{site.norm}"] = NormBiasSpec(bias.shape[0])
    attention_tensors, attention_specs = _attention(rounded, row_orders)
    tensors |= attention_tensors
    stored = {name: _in_stored_dtype(name, tensor, resolved.skeleton) for name, tensor in tensors.items()}
    return StoredBlock(stored, specs | attention_specs, tuple(linears), tuned)


def _in_stored_dtype(name: str, tensor: Tensor, skeleton: Skeleton) -> Tensor:
    """The tensor in its stored dtype: unquantized matrices of the model in 16 bits, packed tensors unchanged.

    A matrix that was not edited is cast from the source's own values.
    """
    if tensor.dtype != torch.float32 or name not in skeleton.parameter_shapes():
        return tensor
    original = skeleton.source.load(name)
    return as_stored(original if torch.equal(original.float(), tensor.to(original.device)) else tensor)


def _absorbed(rounded: RoundedBlock) -> tuple[dict[str, Linear], dict[str, Tensor]]:
    """Packed linears and float32 parameters, by name, with the column scales absorbed into upstream weights."""
    weights, exact = {name: linear.weight.main for name, linear in rounded.terms.items()}, dict(rounded.exact)
    for site, c in rounded.absorbed:
        absorb_(site, c, weights, exact)
    terms = {
        name: replace(linear, weight=replace(linear.weight, main=weights[name]))
        for name, linear in rounded.terms.items()
    }
    return terms, exact


def _ordered(
    rounded: RoundedBlock, terms: dict[str, Linear], exact: dict[str, Tensor]
) -> tuple[dict[str, Linear], dict[str, Tensor], dict[str, Tensor]]:
    """Carry out the channel orders of inputs: move rows of upstream weights, or give readers a gather.

    Returns the packed linears, the float32 parameters, and a mapping from the name of a linear to (rows,) int64: entry
    i is the old index of the row that is now row i.
    """
    row_orders: dict[str, Tensor] = {}
    for site in rounded.block.arch.sites:
        rows, order = _offline_rows(rounded, site), rounded.bases[site.name].order
        row_orders |= rows or {}
        for name, index in (rows or {}).items():
            if name in terms:
                terms[name] = replace(terms[name], weight=terms[name].weight.rows(index))
            else:
                exact[f"{name}.weight"] = exact[f"{name}.weight"][index]
            if f"{name}.bias" in exact:
                exact[f"{name}.bias"] = exact[f"{name}.bias"][index]
        if order is not None and rows is None:
            gather = order.to(gather_type(order.shape[0]))
            for name in terms.keys() & set(site.readers):
                terms[name] = replace(terms[name], input=replace(terms[name].input, gather=gather))
    return terms, exact, row_orders


def _offline_rows(rounded: RoundedBlock, site: Site) -> dict[str, Tensor] | None:
    """Name of an upstream linear -> (rows,) int64, the new order of its rows, as `offline_rows` gives it.

    None if the site needs no order, or if moving rows cannot carry it out. In the latter case its readers gather.
    """
    basis = rounded.bases[site.name]
    if basis.order is None or basis.blocks or not all(name in rounded.terms for name in site.readers):
        return None
    return offline_rows(site, basis.order, rounded.block.heads)


def shared_inputs(site: Site, terms: Mapping[str, Linear]) -> dict[str, str]:
    """Name of a reader -> name of an earlier reader with the same input steps, which stores them for both."""
    firsts, shared = list[str](), dict[str, str]()
    for name in site.readers:
        linear = terms.get(name)
        if linear is None or linear.input.is_plain:
            continue
        first = next((first for first in firsts if terms[first].input.same_as(linear.input)), None)
        if first is None:
            firsts.append(name)
        else:
            shared[name] = first
    return shared


def _edited(rounded: RoundedBlock, steps: Steps) -> set[str]:
    """Names of linears whose stored weight is in another basis than the original weight."""
    arch = rounded.block.arch
    if steps.transforms or steps.rotation != "none" or steps.orders_residual or steps.tuning is not None:
        return set(arch.linears)
    edited = {name for site, _ in rounded.absorbed for name in (*site.readers, *site.writers)}
    for site in arch.sites:
        rows = _offline_rows(rounded, site)
        edited |= {*site.readers, *rows} if rows else set()
        if site.per_head and steps.value_rotation != "none":
            edited |= {*site.readers, *site.writers}
    return edited


def _attention(rounded: RoundedBlock, row_orders: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """Tensors and specs of the attention module: keys and values of the prompt prefix, mean of the keys.

    row_orders: name of a linear -> (rows,), the old index of each of its rows.
    """
    block, attention = rounded.block, f"{rounded.block.path}.{rounded.block.arch.attention}"
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    if rounded.prefix is not None:
        states = stored_states(rounded.prefix, block, rounded.absorbed, row_orders)
        tensors |= prefix_state(attention, states)
        specs[attention] = PrefixSpec(*states[0].shape)
    cache_quantizer = rounded.cache_quantizer
    if cache_quantizer is not None and cache_quantizer.center is not None:
        center, where = stored_center(cache_quantizer.center, block, row_orders), f"{attention}.{KEY_CENTER}"
        tensors[f"{where}.mean"], specs[where] = center, KeyCenterSpec.of(center, cache_quantizer.scheme)
    return tensors, specs
