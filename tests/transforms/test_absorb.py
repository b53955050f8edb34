"""Column scales handed to whatever writes the channels: codes stay, and the function stays up to rounded scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import subnibble
from subnibble import Recipe
from subnibble.arch.llama import ATTENTION_IN, ATTENTION_OUT, MLP_HIDDEN, MLP_IN
from subnibble.arch.site import Heads, Site
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import HeadInputSpec
from subnibble.pipeline import round as rounding
from subnibble.pipeline import store
from subnibble.rounding.dual_scale import DualScale
from subnibble.rounding.levels import Fitted
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix, scale_dtype
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.absorb import absorb_, can_absorb

UP, GATE, DOWN = "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"
V, OUT = "self_attn.v_proj", "self_attn.o_proj"
ROWS, COLUMNS = 12, 39
SCHEMES = {
    "no zero-point": Scheme(3, 16, "none"),
    "integer zero-point": Scheme(4, 16, "integer"),
    "real zero-point": Scheme(2, 16, "real"),
    "bfloat16 scales": Scheme(3, 16, "real", "bfloat16"),
    "float32 scales": Scheme(3, -1, "integer", "float32"),
    "sign, 2 bits": Scheme(2, 16, "none", "float16", "sign"),
    "sign, 3 bits": Scheme(3, 16, "none", "float16", "sign"),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
HEADS, SHARED = Heads(3, 3, 4), Heads(6, 3, 4)


def packed_range(scheme: Scheme, seed: int = 0) -> PackedRange:
    """Random codes; scales between 2^-8 and 2^-3, of sign grids each half of the one before."""
    generator = torch.Generator().manual_seed(seed)
    groups, stored = scheme.groups(COLUMNS), scale_dtype(scheme)
    codes = torch.randint(0, scheme.levels, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    scales = torch.exp2(torch.rand(ROWS, groups, 1, generator=generator) * 5 - 8)
    scales = (scales * torch.exp2(-torch.arange(scheme.scales_per_group))).flatten(1).to(stored).float()
    if scheme.zero_point == "none":
        return PackedRange.pack(QuantizedMatrix(codes, scales, None), scheme)
    zeros = torch.randint(0, scheme.levels, (ROWS, groups), generator=generator).float()
    if scheme.zero_point == "real":
        zeros = (zeros + torch.rand(ROWS, groups, generator=generator) - 3).to(stored).float()
    return PackedRange.pack(QuantizedMatrix(codes, scales, zeros), scheme)


def column_scales(seed: int = 1, size: int = ROWS) -> Tensor:
    return torch.exp2(torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 4 - 2)


def magnitudes(tensor: PackedTensor) -> Tensor:
    """What rounding a scale can move each weight by, in units of its relative error: |w|, of sign grids sum |r_k|."""
    parts = []
    for part in tensor.ranges:
        if part.scheme.grid == "sign":
            sums = part.scales.double().unflatten(1, (-1, part.scheme.bits)).sum(-1)
            bounds = part.scheme.group_bounds(part.num_columns)
            widths = torch.tensor([stop - start for start, stop in bounds])
            parts.append(sums.repeat_interleave(widths, dim=1))
        else:
            parts.append(part.dequantize().double().abs())
    return torch.cat(parts, dim=1)


def is_merged(old: PackedTensor, new: PackedTensor, c: Tensor) -> bool:
    """Whether `new` is `diag(c) old` with codes and zeros untouched and scales rounded once to their type."""
    for a, b in zip(old.ranges, new.ranges, strict=True):
        same_zeros = a.zeros is b.zeros is None or torch.equal(a.zeros, b.zeros)
        if not (a.scheme == b.scheme and torch.equal(a.codes, b.codes) and same_zeros):
            return False
        if b.scales.dtype != a.scales.dtype:
            return False
        target = a.scales.double() * c.double().unsqueeze(1)
        half_step = torch.finfo(a.scales.dtype).eps / 2
        # A float32 product of a float32 scale is rounded twice at most.
        if not bool(((b.scales.double() - target).abs() <= half_step * 1.001 * target.abs()).all()):
            return False
    steps = max(torch.finfo(part.scales.dtype).eps for part in old.ranges) / 2 + 4 * torch.finfo(torch.float32).eps
    exact = old.dequantize().double() * c.double().unsqueeze(1)
    bound = steps * magnitudes(old) * c.double().unsqueeze(1)
    return bool(((new.dequantize().double() - exact).abs() <= bound).all())


def merged(old: PackedTensor, c: Tensor) -> PackedTensor:
    packed = {UP: old}
    absorb_(MLP_HIDDEN, c, packed, {})
    return packed[UP]


@every_scheme
def test_merging_equals_scaling_the_dense_rows_with_codes_and_zeros_untouched(scheme: Scheme) -> None:
    old = PackedTensor((packed_range(scheme),))
    assert is_merged(old, merged(old, column_scales()), column_scales())


def test_every_range_of_a_writer_is_merged() -> None:
    old = PackedTensor((packed_range(SCHEMES["integer zero-point"]), packed_range(SCHEMES["sign, 2 bits"], 4)))
    assert is_merged(old, merged(old, column_scales()), column_scales())


@every_scheme
def test_merging_powers_of_two_is_exact_to_the_last_bit(scheme: Scheme) -> None:
    old = PackedTensor((packed_range(scheme),))
    c = torch.exp2(torch.arange(ROWS).remainder(5) - 2.0)
    new = merged(old, c)
    assert torch.equal(new.dequantize(), old.dequantize() * c.unsqueeze(1))
    back = merged(new, 1 / c)
    assert all(torch.equal(part, old.state()[name]) for name, part in back.state().items())


def c_on_columns(old: PackedRange, c: Tensor) -> PackedRange:
    groups = torch.arange(old.scales.shape[1]).remainder(ROWS)
    return replace(old, scales=(old.scales.float() * c[groups]).to(old.scales.dtype))


def c_of_the_next_row(old: PackedRange, c: Tensor) -> PackedRange:
    return replace(old, scales=(old.scales.float() * c.roll(1).unsqueeze(1)).to(old.scales.dtype))


def divided(old: PackedRange, c: Tensor) -> PackedRange:
    return replace(old, scales=(old.scales.float() / c.unsqueeze(1)).to(old.scales.dtype))


def first_group_only(old: PackedRange, c: Tensor) -> PackedRange:
    scales = old.scales.float()
    scales[:, 0] *= c
    return replace(old, scales=scales.to(old.scales.dtype))


def zeros_scaled_too(old: PackedRange, c: Tensor) -> PackedRange:
    assert old.zeros is not None
    scales = (old.scales.float() * c.unsqueeze(1)).to(old.scales.dtype)
    return replace(old, scales=scales, zeros=(old.zeros.float() * c.unsqueeze(1)).to(old.zeros.dtype))


def one_scale_a_step_off(old: PackedRange, c: Tensor) -> PackedRange:
    scales = (old.scales.float() * c.unsqueeze(1)).to(old.scales.dtype)
    scales[3, 1] *= 1 + 2 * torch.finfo(scales.dtype).eps
    return replace(old, scales=scales)


def rounded_to_bfloat16(old: PackedRange, c: Tensor) -> PackedRange:
    return replace(old, scales=(old.scales.float() * c.unsqueeze(1)).bfloat16().to(old.scales.dtype))


MERGE_FAULTS = [
    c_on_columns,
    c_of_the_next_row,
    divided,
    first_group_only,
    one_scale_a_step_off,
    rounded_to_bfloat16,
]


@pytest.mark.parametrize(
    ("name", "fault"),
    [("real zero-point", zeros_scaled_too)]
    + [(n, f) for n in ("real zero-point", "sign, 3 bits") for f in MERGE_FAULTS],
)
def test_the_merge_oracle_rejects_planted_faults(name: str, fault: Callable[..., PackedRange]) -> None:
    old = packed_range(SCHEMES[name])
    assert not is_merged(PackedTensor((old,)), PackedTensor((fault(old, column_scales()),)), column_scales())


def dense_parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        f"{UP}.weight": (ROWS, COLUMNS), f"{UP}.bias": (ROWS,), f"{GATE}.weight": (ROWS, COLUMNS),
        f"{GATE}.bias": (ROWS,), f"{DOWN}.weight": (9, ROWS), f"{DOWN}.bias": (9,),
        f"{V}.weight": (ROWS, COLUMNS), f"{V}.bias": (ROWS,),
        "input_layernorm.weight": (ROWS,), "post_attention_layernorm.weight": (ROWS,),
        "post_attention_layernorm.bias": (ROWS,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("site", "scaled"),
    [
        (MLP_HIDDEN, {f"{UP}.weight", f"{UP}.bias"}),
        (ATTENTION_OUT, {f"{V}.weight", f"{V}.bias"}),
        (ATTENTION_IN, {"input_layernorm.weight"}),
        (MLP_IN, {"post_attention_layernorm.weight", "post_attention_layernorm.bias"}),
    ],
    ids=lambda value: value.name if isinstance(value, Site) else "",
)
def test_dense_writers_norms_and_biases_are_scaled_and_nothing_else(site: Site, scaled: set[str]) -> None:
    before, dense, c = dense_parameters(), dense_parameters(), column_scales()
    absorb_(site, c, {}, dense)
    assert list(dense) == list(before)
    for name, value in dense.items():
        factor = c.unsqueeze(1) if value.dim() == 2 else c
        assert torch.equal(value, before[name] * factor if name in scaled else before[name]), name


def test_a_packed_writer_has_its_bias_scaled_and_its_gate_left_alone() -> None:
    up, gate = (PackedTensor((packed_range(SCHEMES["integer zero-point"], seed),)) for seed in (0, 1))
    packed, dense, before = {UP: up, GATE: gate}, dense_parameters(), dense_parameters()
    # What is packed is stored from there; its dense form is of no consequence.
    absorb_(MLP_HIDDEN, column_scales(), packed, dense)
    assert is_merged(up, packed[UP], column_scales())
    assert packed[GATE] is gate
    assert torch.equal(dense[f"{UP}.bias"], before[f"{UP}.bias"] * column_scales())
    for name in (f"{GATE}.weight", f"{GATE}.bias", f"{DOWN}.bias"):
        assert torch.equal(dense[name], before[name])


def test_the_readers_and_a_gated_mlp_see_no_difference() -> None:
    """V (c o h) = (V diag c) h for the MLP as it computes, not as the table of sites says."""
    dense, c = dense_parameters(), column_scales()
    x = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(3))

    def run(parameters: dict[str, Tensor], down: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(x @ parameters[f"{GATE}.weight"].T + parameters[f"{GATE}.bias"])
        hidden = gate * (x @ parameters[f"{UP}.weight"].T + parameters[f"{UP}.bias"])
        return (hidden.double() @ down.double().T) + parameters[f"{DOWN}.bias"]

    def distance(site: Site) -> float:
        changed = dense_parameters()
        absorb_(site, c, {}, changed)
        target = run(dense, dense[f"{DOWN}.weight"] * c)
        return float(((run(changed, dense[f"{DOWN}.weight"]) - target).abs() / target.abs().mean()).max())

    assert distance(MLP_HIDDEN) < 1e-5
    for wrong in (
        replace(MLP_HIDDEN, writers=(GATE,)),
        replace(MLP_HIDDEN, writers=(UP, GATE)),
        replace(MLP_HIDDEN, writers=()),
    ):
        assert distance(wrong) > 1e-2


# When it may be done.


def writer(scale: float, stored: str = "float16") -> dict[str, PackedTensor]:
    """A packed up_proj and v_proj whose scales are all `scale`."""
    scheme = Scheme(4, 16, "integer", stored)
    part = packed_range(scheme)
    tensor = PackedTensor((replace(part, scales=torch.full_like(part.scales, scale)),))
    return {UP: tensor, V: tensor}


def zeros_of(packed: dict[str, PackedTensor]) -> dict[str, PackedTensor]:
    """The same with all codes at their zero-points."""
    result = {}
    for name, tensor in packed.items():
        (part,) = tensor.ranges
        quantized = part.unpack()
        zeros = torch.full_like(quantized.zeros, 3)
        codes = torch.full_like(quantized.codes, 3)
        result[name] = PackedTensor((PackedRange.pack(QuantizedMatrix(codes, quantized.scales, zeros), part.scheme),))
    return result


@pytest.mark.parametrize(
    ("site", "together", "heads", "allowed"),
    [
        (MLP_HIDDEN, (DOWN,), SHARED, True),
        (MLP_IN, (GATE, UP), SHARED, True),
        (MLP_IN, (UP, GATE), HEADS, True),
        (MLP_IN, (UP,), HEADS, False),
        (MLP_IN, (GATE,), HEADS, False),
        (ATTENTION_IN, ("self_attn.q_proj", "self_attn.k_proj"), HEADS, False),
        (ATTENTION_IN, ("self_attn.q_proj", "self_attn.k_proj", V), SHARED, True),
        (ATTENTION_OUT, (OUT,), HEADS, True),
        (ATTENTION_OUT, (OUT,), SHARED, False),
        (replace(ATTENTION_OUT, edits=frozenset({"permute"})), (OUT,), HEADS, False),
        (replace(MLP_HIDDEN, edits=frozenset()), (DOWN,), HEADS, False),
    ],
)
def test_a_source_takes_scales_that_all_its_readers_share_and_no_head_shares(
    site: Site, together: tuple[str, ...], heads: Heads, allowed: bool
) -> None:
    assert can_absorb(site, heads, together, writer(0.01), column_scales()) is allowed
    # Nothing is packed where the writer is skipped: its dense weights take any scale.
    assert can_absorb(site, heads, together, {}, column_scales()) is allowed


NORMAL, LARGEST = 2.0**-14, 65504.0


@pytest.mark.parametrize(
    ("scale", "factor", "allowed"),
    [
        (1000.0, 65.0, True),
        (1000.0, 66.0, False),
        (NORMAL * 8, 1 / 8, True),
        (NORMAL * 8, 1 / 8.01, True),
        # Below the normal numbers a step is 2^-24: powers of two lose nothing, others most of their digits, or all.
        (NORMAL / 4, 1 / 8, True),
        (NORMAL / 4, 8.0, True),
        (NORMAL / 16, 1 / 3, False),
        (NORMAL / 512, 1 / 8, False),
    ],
)
def test_scales_that_would_leave_their_type_are_not_merged(scale: float, factor: float, allowed: bool) -> None:
    # One channel of many is enough.
    c = torch.ones(ROWS)
    c[5] = factor
    assert can_absorb(MLP_HIDDEN, HEADS, (DOWN,), writer(scale), c) is allowed
    assert can_absorb(ATTENTION_OUT, HEADS, (OUT,), writer(scale), c) is allowed
    # Types with the range of float32 have no such bounds, and neither has a norm.
    assert can_absorb(MLP_HIDDEN, HEADS, (DOWN,), writer(scale, "bfloat16"), c)
    assert can_absorb(MLP_IN, HEADS, (GATE, UP), writer(scale), c)
    # Nothing is lost of groups of zeros.
    assert can_absorb(MLP_HIDDEN, HEADS, (DOWN,), zeros_of(writer(scale)), c) is (allowed or scale * factor < LARGEST)
    if allowed:
        merged_scales = merged(writer(scale)[UP], c).ranges[0].scales
        assert bool(torch.isfinite(merged_scales).all())
        assert bool((merged_scales[5] > 0).all())


# The whole way: the same codes, stored with explicit column scales and with absorbed ones.


def tensors_of(folder: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        result |= load_file(file)
    return result


def never(*args: Any) -> bool:
    return False


def run(source: Path, tokens: Path, out: Path, absorb: Any = absorb_, allowed: Any = can_absorb) -> Path:
    """Quantize with column scales everywhere, rounded to float16 at once so that both ways see the same numbers."""
    fit = DualScale.fit

    def rounded(self: DualScale, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int) -> Fitted:
        result = fit(self, group, scheme, weights, index)
        assert result.column_scales is not None
        return replace(result, column_scales=result.column_scales.half().float())

    recipe = Recipe(
        method="d2quant", bits=3, group_size=16, calibration=str(tokens), num_windows=2, window=32,
        options={"columns": "all", "iterations": 2}, device="cpu",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualScale, "fit", rounded)
        patch.setattr(store, "absorb_", absorb)
        patch.setattr(rounding, "can_absorb", allowed)
        subnibble.quantize(source, out, recipe)
    return out


@pytest.fixture(scope="module")
def explicit(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("explicit")
    return {name: run(folders[name], token_file, root / name, allowed=never) for name in ("llama", "llama-tied")}


@pytest.fixture(scope="module")
def absorbed(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("absorbed")
    return {name: run(folders[name], token_file, root / name) for name in ("llama", "llama-tied")}


def distance(folder: Path, other: Path) -> float:
    """Largest relative distance of any token's logits."""
    ids = torch.arange(40).view(2, 20) % 96
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (folder, other))
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_an_absorbed_checkpoint_is_the_explicit_one_with_the_same_codes(
    name: str, explicit: dict[str, Path], absorbed: dict[str, Path]
) -> None:
    actual, target = tensors_of(absorbed[name]), tensors_of(explicit[name])
    linears = {path for path in target if path.endswith(".column_scale")}
    # One for each tensor that linears read.
    assert len(linears) == 3 * 4
    kept = {path for path in actual if path.endswith(".column_scale")}
    # Query heads of `llama` share key-value heads, and what writes o_proj's inputs cannot take its scales.
    assert kept == ({path for path in linears if OUT in path} if name == "llama" else set())
    for path in target:
        if path.endswith((".codes", ".zeros")):
            assert torch.equal(actual[path], target[path]), path
    assert distance(absorbed[name], explicit[name]) < 2e-3


def without_mix(folder: Path) -> dict[str, Any]:
    """What config.json would say without what stands in front of a rotated model's tied head."""
    config = PackedConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
    modules = {path: entry for path, entry in config.modules.items() if not isinstance(entry, HeadInputSpec)}
    assert len(modules) == len(config.modules) - 1
    return PackedConfig(modules).to_dict()


def test_column_scales_that_nothing_absorbs_are_stored(explicit: dict[str, Path], absorbed: dict[str, Path]) -> None:
    quantization = without_mix(explicit["llama-tied"])
    linears = {path: entry for path, entry in quantization["modules"].items() if entry["kind"] == "linear"}
    inputs = {path: linears[entry.get("input", path)] for path, entry in linears.items() if "layers" in path}
    assert {entry.get("column_scale") for entry in inputs.values()} == {True}
    quantization = without_mix(absorbed["llama-tied"])
    assert {entry["kind"] for entry in quantization["modules"].values()} == {"linear", "norm_bias"}
    assert not any("column_scale" in entry for entry in quantization["modules"].values())


def nothing_absorbed(site: Site, c: Tensor, packed: Any, dense: Any) -> None:
    pass


def divided_instead(site: Site, c: Tensor, packed: Any, dense: Any) -> None:
    absorb_(site, 1 / c, packed, dense)


def gate_scaled_too(site: Site, c: Tensor, packed: Any, dense: Any) -> None:
    absorb_(replace(site, writers=(*site.writers, *site.followers)), c, packed, dense)


def biases_forgotten(site: Site, c: Tensor, packed: Any, dense: Any) -> None:
    before = {name: value.clone() for name, value in dense.items() if name.endswith(".bias")}
    absorb_(site, c, packed, dense)
    dense.update(before)


@pytest.mark.parametrize(
    "fault", [nothing_absorbed, divided_instead, gate_scaled_too, biases_forgotten], ids=lambda fault: fault.__name__
)
def test_planted_faults_of_absorption_move_the_stored_model(
    fault: Any, explicit: dict[str, Path], folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    out = run(folders["llama"], token_file, tmp_path / "faulty", absorb=fault)
    assert distance(out, explicit["llama"]) > 0.02
