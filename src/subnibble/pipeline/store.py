"""A rounded block as it is stored: column scales absorbed, orders of inputs folded into rows or gathered."""

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
    """tensors: by name in the checkpoint, as they go to the file. specs: of its modules. linears: what the report
    says of each. tuned: what it says of the block's tuning, None for none.
    """

    tensors: Mapping[str, Tensor]
    specs: Mapping[str, Spec]
    linears: tuple[LinearReport, ...]
    tuned: BlockReport | None = None

    def without_tensors(self) -> StoredBlock:
        """What is left to remember once the tensors are on disk."""
        return replace(self, tensors={})


def store(rounded: RoundedBlock, resolved: Resolved, tuned: BlockReport | None = None) -> StoredBlock:
    """What the checkpoint gets of a block. tuned: see `StoredBlock`."""
    block, path = rounded.block, rounded.block.path
    terms, exact = _absorbed(rounded)
    terms, exact, moved = _ordered(rounded, terms, exact)
    inputs = {name: first for site in block.arch.sites for name, first in _inputs(site, terms).items()}
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    linears = []
    edited = _edited(rounded, resolved.steps)
    for name, own in terms.items():
        first = inputs.get(name)
        whole = replace(own, weight=replace(own.weight, bias=exact.get(f"{name}.bias")))
        spec = linear_spec(whole, None if first is None else f"{path}.{first}")
        specs[f"{path}.{name}"] = spec
        own_parts = {key: part for key, part in linear_state(whole).items() if key not in spec.elsewhere}
        tensors |= {f"{path}.{name}.{key}": part for key, part in own_parts.items()}
        bits = spec.stored_bits / (spec.layout.rows * spec.layout.columns)
        linears.append(replace(rounded.linears[name], effective_bits=bits, moved=name in edited))
    tensors |= {f"{path}.{name}": part for name, part in exact.items() if name.removesuffix(".weight") not in terms}
    for site in block.arch.sites:
        if site.norm is not None and f"{site.norm}.bias" in exact:
            bias = exact[f"{site.norm}.bias"].to(torch.float16)
            tensors[f"{path}.{site.norm}.bias"] = bias
            specs[f"{path}.{site.norm}"] = NormBiasSpec(bias.shape[0])
    held = _attention(rounded, moved)
    named = {name: _own_type(name, tensor, resolved.skeleton) for name, tensor in (tensors | held[0]).items()}
    return StoredBlock(named, specs | held[1], tuple(linears), tuned)


def _own_type(name: str, tensor: Tensor, skeleton: Skeleton) -> Tensor:
    """A tensor as it goes to the file: the model's own matrices at 16 bits, packed parts as they are.

    A matrix that was not edited is cast from the source's own numbers.
    """
    if tensor.dtype != torch.float32 or name not in skeleton.parameter_shapes():
        return tensor
    own = skeleton.source.load(name)
    return as_stored(own if torch.equal(own.float(), tensor.to(own.device)) else tensor)


def _absorbed(rounded: RoundedBlock) -> tuple[dict[str, Linear], dict[str, Tensor]]:
    """Linears and parameters after their writers took the column scales that are theirs to take."""
    weights, exact = {name: own.weight.main for name, own in rounded.terms.items()}, dict(rounded.exact)
    for site, c in rounded.absorbed:
        absorb_(site, c, weights, exact)
    terms = {n: replace(own, weight=replace(own.weight, main=weights[n])) for n, own in rounded.terms.items()}
    return terms, exact


def _ordered(
    rounded: RoundedBlock, terms: dict[str, Linear], exact: dict[str, Tensor]
) -> tuple[dict[str, Linear], dict[str, Tensor], dict[str, Tensor]]:
    """Both with the orders of inputs in them, and where rows of a linear came from, by its name: (rows,) each."""
    moved: dict[str, Tensor] = {}
    for site in rounded.block.arch.sites:
        rows, order = _offline_rows(rounded, site), rounded.bases[site.name].order
        moved |= rows or {}
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
    return terms, exact, moved


def _offline_rows(rounded: RoundedBlock, site: Site) -> dict[str, Tensor] | None:
    """See `offline_rows`; None, too, where a site's readers have no order of their own."""
    basis = rounded.bases[site.name]
    if basis.order is None or basis.blocks or not all(name in rounded.terms for name in site.readers):
        return None
    return offline_rows(site, basis.order, rounded.block.heads)


def _inputs(site: Site, terms: Mapping[str, Linear]) -> dict[str, str]:
    """Readers that do to the site's tensor what an earlier one does, which stores it for them; and which."""
    firsts, found = list[str](), dict[str, str]()
    for name in site.readers:
        own = terms.get(name)
        if own is None or own.input.is_plain:
            continue
        first = next((first for first in firsts if terms[first].input.same_as(own.input)), None)
        if first is None:
            firsts.append(name)
        else:
            found[name] = first
    return found


def _edited(rounded: RoundedBlock, steps: Steps) -> set[str]:
    """Linears whose stored weight is in another basis than the original's."""
    arch = rounded.block.arch
    if steps.transforms or steps.rotation != "none" or steps.orders_residual or steps.tuning is not None:
        return set(arch.linears)
    found = {name for site, _ in rounded.absorbed for name in (*site.readers, *site.writers)}
    for site in arch.sites:
        rows = _offline_rows(rounded, site)
        found |= {*site.readers, *rows} if rows else set()
        if site.per_head and steps.value_rotation != "none":
            found |= {*site.readers, *site.writers}
    return found


def _attention(rounded: RoundedBlock, moved: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """What the attention holds: the prefix's states, the centre of its keys."""
    block, attention = rounded.block, f"{rounded.block.path}.{rounded.block.arch.attention}"
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    if rounded.prefix is not None:
        states = stored_states(rounded.prefix, block, rounded.absorbed, moved)
        tensors |= prefix_state(attention, states)
        specs[attention] = PrefixSpec(*states[0].shape)
    coding = rounded.coding
    if coding is not None and coding.center is not None:
        center, where = stored_center(coding.center, block, moved), f"{attention}.{KEY_CENTER}"
        tensors[f"{where}.mean"], specs[where] = center, KeyCenterSpec.of(center, coding.scheme)
    return tensors, specs
