"""Salient channels go where they take most output error a bit, within the budget of one rank everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subnibble import Recipe, quantize
from subnibble.calibrate.stream import BlockStream
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.corrections.ranks import Gains, allocate, gains_of
from subnibble.corrections.salient import SalientColumns
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Skeleton
from subnibble.report import Report
from subnibble.rounding import grid
from subnibble.runtime.activations import quantize_values
from subnibble.scheme import ActivationScheme, Scheme

SCHEME = Scheme(4, 16, "none")


def gains(values: list[float], rows: int = 8, columns: int = 64) -> Gains:
    """Gains of each step of 16 channels, spread evenly over them."""
    per_channel = torch.tensor(values).repeat_interleave(16)[:columns] / 16
    return Gains(per_channel, rows, 16, SCHEME)


def spent(found: dict[str, Gains], ranks: dict[str, int]) -> int:
    return sum(found[path].bits(rank) for path, rank in ranks.items())


def test_a_budget_goes_to_the_largest_gains_first() -> None:
    found = {"a": gains([8.0, 4.0, 2.0, 1.0]), "b": gains([1.0, 0.5, 0.2, 0.1]), "c": gains([3.0, 0.9, 0.1, 0.1])}
    assert allocate(found, 16) == {"a": 32, "b": 0, "c": 16}
    assert allocate(found, 32) == {"a": 64, "b": 16, "c": 16}


def test_a_wide_linear_pays_for_its_rows() -> None:
    found = {"narrow": gains([1.0, 1.0, 1.0, 1.0], rows=8), "wide": gains([3.0, 3.0, 3.0, 3.0], rows=64)}
    ranks = allocate(found, 16)
    assert ranks["narrow"] == 64
    assert spent(found, ranks) <= spent(found, dict.fromkeys(found, 16))


@pytest.mark.parametrize("rank", [1, 16, 40, 64, 100])
def test_the_budget_is_never_passed_and_no_rank_is_wider_than_its_linear(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    found = {
        str(i): Gains(torch.rand(columns, generator=generator), 8 * (1 + i), 16, SCHEME)
        for i, columns in enumerate((48, 39, 64, 80))
    }
    ranks = allocate(found, rank)
    assert spent(found, ranks) <= sum(g.bits(min(rank, g.gains.shape[0])) for g in found.values())
    assert all(0 <= ranks[path] <= found[path].gains.shape[0] for path in found)


def test_equal_gains_share_equally() -> None:
    found = {str(i): gains([1.0, 0.5, 0.25, 0.1]) for i in range(5)}
    assert set(allocate(found, 32).values()) == {32}


def test_gains_of_inputs_are_what_their_rounding_loses(folders: dict[str, Path]) -> None:
    """Where the remainder of inputs runs again; beside what the weights' rounding loses."""
    skeleton = Skeleton(SafetensorsSource(folders["llama"]), torch.float32, torch.device("cpu"))
    block = skeleton.load_block(0)
    hidden = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(0))
    inputs, names = ActivationScheme(4, 16), block.arch.linears
    stream = BlockStream(block, [hidden], skeleton.block_calls(16)[0])
    found = stream.statistics(dict.fromkeys(names, SCHEME), dict.fromkeys(names, inputs))
    orders = dict.fromkeys(site.name for site in block.arch.sites)
    usual, twice = (gains_of(block, found, {}, orders, SalientColumns(16, residual=r)) for r in ("none", "salient"))
    for site in block.arch.sites:
        x = found.samples[site.name]
        lost = (quantize_values(x, inputs) - x).square().sum(0)
        for name in site.readers:
            weight, path = block.linear(name).weight, f"{block.path}.{name}"
            energy = float((x @ weight.T).square().sum())
            error = weight - grid.nearest(weight, SCHEME)
            by_weight = x.square().sum(0) * error.square().sum(0) / energy
            torch.testing.assert_close(usual[path].gains, by_weight.detach(), rtol=1e-3, atol=1e-9)
            wanted = by_weight + lost * weight.square().sum(0) / energy
            torch.testing.assert_close(twice[path].gains, wanted.detach(), rtol=1e-3, atol=1e-9)


def made(folder: Path, tokens: Path, out: Path, **options: object) -> Report:
    recipe = Recipe(
        method="serq", bits=4, group_size=16, activation_bits=4, calibration=str(tokens), num_windows=8, window=32,
        dtype="float32", options={"rank": 16, "rounding": "rtn", **options},
    )  # fmt: skip
    return quantize(folder, out, recipe)


def test_ranks_by_gain_lower_the_summed_error_at_no_more_bits(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    uniform = made(folders["llama"], token_file, tmp_path / "uniform")
    own = made(folders["llama"], token_file, tmp_path / "gain", ranks="gain")
    assert own.size["effective_bits"] <= uniform.size["effective_bits"] + 1e-9
    assert len({linear.notes.get("rank", 0) for linear in own.linears}) > 1
    total = [sum(linear.output_error for linear in report.linears) for report in (own, uniform)]
    assert total[0] < total[1]


@pytest.mark.parametrize(("options", "message"), [
    ({"ranks": "most"}, "choose one of uniform, gain"),
    ({"ranks": "gain", "rotation": "groups"}, "neither rotation nor"),
    ({"ranks": "gain", "rank": 0}, "needs a rank above 0"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(
    options: dict[str, object], message: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=message):
        made(folders["llama"], token_file, tmp_path / "out", **options)
