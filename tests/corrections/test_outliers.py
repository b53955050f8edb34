"""Atom's outlier columns: split exactly, and compensated as one pass over all columns would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import subnibble
from subnibble import Recipe
from subnibble.calibrate.windows import calibration_windows
from subnibble.corrections.correction import RoundMain
from subnibble.corrections.outliers import OutlierColumns
from subnibble.errors import BadRecipe
from subnibble.methods import find_method
from subnibble.rounding import grid
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN
from subnibble.runtime.activations import quantize, quantize_values
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.saliency import Saliency

SCHEME = Scheme(3, 8, "none")


def problem(rows: int = 12, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, -8:] *= 6
    return weight, x.T @ x


def output_error(error: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((error @ gram) * error).sum())


def rounded(rounder, weight, gram, count=8):
    rounding, packed, _ = OutlierColumns(count).round(weight, gram, SCHEME, RoundMain(rounder, SCHEME, "here"))
    return rounding, packed


def test_to_nearest_each_part_is_its_own() -> None:
    weight, _ = problem()
    _, packed = rounded(RTN(Clip("minmax")), weight, None)
    assert [(part.num_columns, part.scheme.bits) for part in packed.ranges] == [(32, 3), (8, 8)]
    dense = packed.dequantize()
    assert torch.equal(dense[:, :32], grid.nearest(weight[:, :32], SCHEME))
    assert torch.equal(dense[:, 32:], grid.nearest(weight[:, 32:], Scheme(8, -1, "none")))


def test_outliers_take_what_they_can_of_the_error() -> None:
    """Given the codes before, no other weights of the outlier columns do better, but for damping and 8 bits."""
    weight, gram = problem()
    _, packed = rounded(GPTQ(Clip("minmax"), order="natural"), weight, gram)
    dense = packed.dequantize()
    error = weight - dense
    best = error.clone()
    best[:, 32:] = -torch.linalg.solve(gram[32:, 32:], gram[32:, :32] @ error[:, :32].T).T
    left, least = output_error(error, gram), output_error(best, gram)
    assert least <= left < 1.05 * least
    plain = error.clone()
    plain[:, 32:] = 0
    assert left < 0.8 * output_error(plain, gram)


def test_columns_before_are_rounded_as_one_pass_over_all_rounds_them() -> None:
    """Error compensation in natural order: codes of the first columns do not know what becomes of the last."""
    weight, gram = problem()
    tiny = 1e-7
    whole = GPTQ(Clip("minmax"), order="natural", damping=tiny)(weight, gram.double(), Scheme(3, 8, "none"), "here")
    import subnibble.corrections.outliers as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_DAMPING", tiny)
        split, _ = rounded(GPTQ(Clip("minmax"), order="natural", damping=tiny), weight, gram.double())
    assert torch.equal(split.quantized.codes, whole.quantized.codes[:, :32])


def test_dead_outliers_take_nothing() -> None:
    weight, gram = problem()
    gram[:, 32:] = gram[32:] = 0
    _, packed = rounded(GPTQ(Clip("minmax"), order="natural"), weight, gram)
    assert torch.equal(packed.dequantize()[:, 32:], grid.nearest(weight[:, 32:], Scheme(8, -1, "none")))


def test_outlier_inputs_have_eight_bits_and_one_scale() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    scheme = ActivationScheme(4, 16, "integer", clip=0.9, outliers=8)
    result = quantize(x, scheme)
    assert result.bounds == [(0, 16), (16, 32), (32, 40)]
    usual = quantize_values(x[:, :32], ActivationScheme(4, 16, "integer", clip=0.9))
    last = quantize_values(x[:, 32:], ActivationScheme(8, -1, "none"))
    assert torch.equal(result.values(), torch.cat([usual, last], 1))
    assert scheme.token_bits(40) == 2 * (16 * 4 + 16 + 4) + 8 * 8 + 16
    assert scheme.name == "a4g16-clip0.9-o8"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BadRecipe, match="positive number of channels"):
        OutlierColumns(0)
    with pytest.raises(BadRecipe, match="at most 39"):
        OutlierColumns(40).check(40, SCHEME, "down_proj")
    with pytest.raises(BadRecipe, match=r"no codes beside an mxfp4 grid \(down_proj\); use a uniform grid"):
        OutlierColumns(8).check(40, Scheme(4, 32, "none", "e8m0", "mxfp4"), "down_proj")
    with pytest.raises(BadRecipe, match="on a uniform grid"):
        ActivationScheme(4, 32, "none", "mxfp4", outliers=8)
    with pytest.raises(BadRecipe, match="rising scores"):
        Saliency("energy", "offline", "rising")
    with pytest.raises(BadRecipe, match="choose one of falling, rising"):
        Saliency(direction="up")


def test_atom_puts_the_strongest_channels_last() -> None:
    atom = find_method("atom")
    steps = atom.build(atom.configure({"outliers": 8}))
    assert (steps.saliency.score, steps.saliency.direction) == ("energy", "rising")
    assert steps.correction == OutlierColumns(8)
    assert steps.cache(4) == {"rope": "before"}
    assert steps.prefers("attention_in", 4) == {"zero_point": "none"}


def test_atom_stores_what_its_rules_say(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    """The first block's linears behind its first norm, to nearest, from the model's own weights and activations."""
    recipe = Recipe(
        method="atom", bits=4, group_size=16, calibration=str(token_file), num_windows=4, window=32, device="cpu",
        options={"outliers": 8, "rounding": "rtn", "clip": "minmax"},
    )  # fmt: skip
    subnibble.quantize(folders["llama"], tmp_path / "out", recipe)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    ids = calibration_windows(str(token_file), lambda: None, 4, 32, recipe.seed, 96)
    with torch.no_grad():
        # The embedding of the result is float16.
        hidden = original.model.embed_tokens.weight.half().float()[ids]
        inputs = original.model.layers[0].input_layernorm(hidden).flatten(0, 1)
    order = inputs.double().square().sum(0).argsort()
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = packed.model.layers[0].self_attn.get_submodule(name)
        assert torch.equal(linear.linear.input.gather.long(), order)
        weight = original.model.layers[0].self_attn.get_submodule(name).weight.detach()[:, order]
        main = grid.nearest(weight[:, :40], Scheme(4, 16, "none"))
        last = grid.nearest(weight[:, 40:], Scheme(8, -1, "none"))
        assert torch.equal(linear.packed.dequantize(), torch.cat([main, last], 1))
