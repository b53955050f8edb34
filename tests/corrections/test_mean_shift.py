"""The bias of a norm is the mean shift of its outputs, sinks and doubtful channels left out where gated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import subnibble
from subnibble import Recipe
from subnibble.calibrate.sinks import ordinary_tokens
from subnibble.calibrate.windows import calibration_windows
from subnibble.checkpoint.entries import NormBiasEntry
from subnibble.checkpoint.packed import packed_config_of
from subnibble.corrections.mean_shift import FORMS, MeanShift
from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.methods import METHODS
from subnibble.model.arch import find_arch
from subnibble.model.site import Heads
from subnibble.model.skeleton import Block
from subnibble.transforms.rotate import make_rotation, rotate_block_

WINDOWS, WINDOW, CHANNELS = 7, 10, 37
both_forms = pytest.mark.parametrize("form", FORMS[1:])
Batches = list[tuple[Tensor, Tensor, Tensor]]


def tokens(seed: int) -> Tensor:
    """(windows, tokens, channels), signed, one channel much larger, one zero."""
    x = torch.randn(WINDOWS, WINDOW, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[..., 4] *= -30
    x[..., 9] = 0
    return x


def batches(wanted: Tensor, found: Tensor, ordinary: Tensor | None = None, size: int = 3) -> Batches:
    """As the pipeline hands them over: a few windows at a time, flattened to tokens."""
    mask = torch.ones(wanted.shape[:2], dtype=torch.bool) if ordinary is None else ordinary
    parts = zip(wanted.split(size), found.split(size), mask.split(size), strict=True)
    return [(a.flatten(0, 1), b.flatten(0, 1), c.flatten()) for a, b, c in parts]


def squared_error(wanted: Tensor, found: Tensor, bias: Tensor) -> Tensor:
    """Of each channel, in float64."""
    return (found.double() + bias.double() - wanted.double()).square().flatten(0, -2).sum(0)


@both_forms
def test_a_constant_shift_is_the_bias(form: str) -> None:
    found = tokens(0)
    bias = MeanShift(form)(batches(found + 0.2, found), WINDOW)
    assert bias.dtype == torch.float32
    assert bias.shape == (CHANNELS,)
    assert float((bias - 0.2).abs().max()) < 1e-6
    assert float((MeanShift(form)(batches(found, found + 0.2), WINDOW) + 0.2).abs().max()) < 1e-6


@both_forms
def test_no_shift_gives_no_bias(form: str) -> None:
    assert torch.equal(MeanShift(form)(batches(tokens(0), tokens(0)), WINDOW), torch.zeros(CHANNELS))


@both_forms
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_outputs_out_of_range_make_no_bias(form: str, number: float) -> None:
    found = tokens(1)
    found[2, 3, 5] = number
    with pytest.raises(NumericalFailure, match='use dtype = "bfloat16" or "float32"'):
        MeanShift(form)(batches(tokens(0), found), WINDOW)


def test_the_published_bias_has_the_least_squared_error() -> None:
    wanted, found = tokens(0) + 0.1, tokens(1)
    bias = MeanShift("published")(batches(wanted, found), WINDOW)
    least = squared_error(wanted, found, bias)
    for step in (1e-3, -1e-3, 0.1, -0.1):
        assert bool((squared_error(wanted, found, bias + step) > least).all())
    assert bool((least <= squared_error(wanted, found, torch.zeros(CHANNELS))).all())


def test_the_bias_commutes_with_a_rotation() -> None:
    q, _ = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(8)))
    wanted, found = tokens(0), tokens(1) / 3
    plain = MeanShift()(batches(wanted, found), WINDOW)
    rotated = MeanShift()(batches(wanted @ q, found @ q), WINDOW)
    assert float((rotated - plain @ q).abs().max()) < 1e-5


@both_forms
def test_batches_of_any_size_and_type_give_the_same_bias(form: str) -> None:
    wanted, found = tokens(0) + 0.3, tokens(0) + 0.1 * tokens(1)
    mask = ordinary_tokens(tokens(3)).view(WINDOWS, WINDOW)
    biases = [MeanShift(form)(batches(wanted, found, mask, size), WINDOW) for size in (1, 2, 3, 7)]
    assert bool(biases[0].any())
    assert all(torch.equal(bias, biases[0]) for bias in biases)
    iterator = iter(batches(wanted, found, mask))
    assert torch.equal(MeanShift(form)(iterator, WINDOW), biases[0])
    half = [(a.bfloat16(), b.bfloat16(), c) for a, b, c in batches(wanted, found, mask)]
    wide = [(a.float(), b.float(), c) for a, b, c in half]
    # The difference of 16-bit numbers is taken in float32.
    assert torch.equal(MeanShift(form)(half, WINDOW), MeanShift(form)(wide, WINDOW))


@both_forms
def test_the_bias_is_kept_within_ten(form: str) -> None:
    shift = torch.tensor([25.0, -25.0, 9.5, -9.5, 10.0])
    found = tokens(0)[..., 10:15]
    bias = MeanShift(form)(batches(found + shift, found), WINDOW)
    assert torch.equal(bias[:2], torch.tensor([10.0, -10.0]))
    assert torch.allclose(bias[2:], torch.tensor([9.5, -9.5, 10.0]), atol=1e-5)


# The gate: halves are every other window.


def halves(shift: Tensor) -> tuple[Tensor, Tensor]:
    return shift[::2].flatten(0, 1).double(), shift[1::2].flatten(0, 1).double()


def brute_gate(shift: Tensor) -> Tensor:
    """Channels in which correcting one half by the other's mean lowers its squared error, both ways."""
    a, b = halves(shift)

    def lowers(fitted: Tensor, held_out: Tensor) -> Tensor:
        return (held_out - fitted.mean(0)).square().sum(0) < held_out.square().sum(0)

    return lowers(a, b) & lowers(b, a)


def rule_gate(shift: Tensor) -> Tensor:
    """Means of one sign, neither as much as twice the other."""
    a, b = (half.mean(0) for half in halves(shift))
    return (a * b > 0) & (a.abs() < 2 * b.abs()) & (b.abs() < 2 * a.abs())


def random_shift() -> Tensor:
    """2000 channels whose two halves are shifted by anything between opposite and equal, noise on top."""
    generator = torch.Generator().manual_seed(11)
    shift = 0.3 * torch.randn(WINDOWS, WINDOW, 2000, generator=generator)
    shift[::2] += torch.randn(2000, generator=generator)
    shift[1::2] += torch.randn(2000, generator=generator)
    return shift


def gate_of(shift: Tensor) -> Tensor:
    return MeanShift("gated")(batches(shift, torch.zeros_like(shift)), WINDOW) != 0


def test_the_gate_corrects_the_channels_where_either_half_helps_the_other() -> None:
    shift = random_shift()
    gate = brute_gate(shift)
    assert 200 < int(gate.sum()) < 1800
    assert torch.equal(rule_gate(shift), gate)
    assert torch.equal(gate_of(shift), gate)
    bias = MeanShift("gated")(batches(shift, torch.zeros_like(shift)), WINDOW)
    published = MeanShift("published")(batches(shift, torch.zeros_like(shift)), WINDOW)
    # Where it is open, the mean over all windows: the halves are of 4 and 3.
    assert torch.equal(bias, torch.where(gate, published, 0.0))


def test_the_gate_oracle_rejects_other_rules() -> None:
    shift = random_shift()
    a, b = (half.mean(0) for half in halves(shift))
    first, second = shift[:4].flatten(0, 1).mean(0), shift[4:].flatten(0, 1).mean(0)
    wrong = {
        "one way only": b * (2 * a - b) > 0,
        "the other way only": a * (2 * b - a) > 0,
        "sign alone": a * b > 0,
        "factors of three": (a * b > 0) & (a.abs() < 3 * b.abs()) & (b.abs() < 3 * a.abs()),
        "first and last windows": (second * (2 * first - second) > 0) & (first * (2 * second - first) > 0),
    }
    for rule, gate in wrong.items():
        assert not torch.equal(gate, brute_gate(shift)), rule


@pytest.mark.parametrize(
    ("even", "odd", "corrected"),
    [
        (1.0, 1.0, True),
        (1.0, 1.9, True),
        (1.9, 1.0, True),
        (1.0, 2.1, False),
        (2.1, 1.0, False),
        (1.0, -1.0, False),
        (-1.0, -1.5, True),
        (0.0, 1.0, False),
    ],
)
def test_a_channel_whose_halves_disagree_is_left_alone(even: float, odd: float, corrected: bool) -> None:
    shift = torch.zeros(WINDOWS, WINDOW, 2)
    shift[::2, :, 1], shift[1::2, :, 1] = even, odd
    bias = MeanShift("gated")(batches(shift, torch.zeros_like(shift)), WINDOW)
    assert float(bias[1]) == pytest.approx((4 * even + 3 * odd) / 7 if corrected else 0)
    assert float(bias[0]) == 0


def test_sinks_are_in_the_published_mean_and_out_of_the_gated_one() -> None:
    found, ordinary = tokens(0), torch.ones(WINDOWS, WINDOW, dtype=torch.bool)
    wanted = found + 0.2
    sinks = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (3, 6), (6, 9)]
    for window, token in sinks:
        ordinary[window, token] = False
        wanted[window, token] += 5
    published = MeanShift("published")(batches(wanted, found, ordinary), WINDOW)
    gated = MeanShift("gated")(batches(wanted, found, ordinary), WINDOW)
    assert torch.allclose(published, torch.full((CHANNELS,), 0.2 + 5 * len(sinks) / (WINDOWS * WINDOW)), atol=1e-5)
    assert torch.allclose(gated, torch.full((CHANNELS,), 0.2), atol=1e-5)
    # With a mask that is in another order, sinks would be found in the mean.
    misplaced = MeanShift("gated")(batches(wanted, found, ordinary.roll(1, 1)), WINDOW)
    assert not torch.allclose(misplaced, gated, atol=1e-2)


def test_first_tokens_and_huge_ones_are_no_ordinary_tokens() -> None:
    hidden = torch.ones(3, 5, 4)
    hidden[1, 2] = -9.9
    hidden[1, 3] = 10.1
    hidden[2, 4, 0] = 1000
    hidden[0, 0] = 1000
    expected = torch.ones(3, 5, dtype=torch.bool)
    expected[:, 0] = False
    expected[1, 3] = expected[2, 4] = False
    assert torch.equal(ordinary_tokens(hidden), expected.flatten())
    assert torch.equal(ordinary_tokens(hidden.bfloat16()), expected.flatten())
    # It is the size beside the other tokens' that counts.
    assert torch.equal(ordinary_tokens(hidden * 1e4), expected.flatten())


def test_an_unknown_form_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(BadRecipe, match="mean_shift is 'all'; choose one of none, published, gated"):
        METHODS["d2quant"].build(METHODS["d2quant"].configure({"mean_shift": "all"}))
    assert METHODS["d2quant"].build(METHODS["d2quant"].configure({"mean_shift": "none"})).mean_shift is None


# The whole way. Recomputed from the stored model alone: a block's teacher is the stored model with the original
# attention in that block (the final norm's: with the original MLP in the last one), its student the stored model.

NORMS = [f"model.layers.{i}.post_attention_layernorm" for i in range(3)] + ["model.norm"]
STEP = 2.0**-11
Runs = Callable[..., tuple[Any, Any, Tensor]]


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(model, form, rotation) -> original model in the basis of the stored one, stored model, calibration windows."""
    made: dict[tuple[str, str, str], tuple[Any, Any, Tensor]] = {}
    root = tmp_path_factory.mktemp("shift")

    def run(name: str, form: str, rotation: str = "none") -> tuple[Any, Any, Tensor]:
        key = (name, form, rotation)
        if key not in made:
            recipe = Recipe(
                method="d2quant", bits=2, group_size=16, calibration=str(token_file), num_windows=12, window=32,
                options={"mean_shift": form, "rotation": rotation, "iterations": 2}, device="cpu",
            )  # fmt: skip
            folder = root / "-".join(key)
            subnibble.quantize(folders[name], folder, recipe)
            windows = calibration_windows(str(token_file), lambda: None, 12, 32, recipe.seed, 96)
            original, stored = (
                AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folders[name], folder)
            )
            made[key] = rotated(original, rotation, recipe), stored, windows
        return made[key]

    return run


def rotated(model: Any, rotation: str, recipe: Recipe) -> Any:
    """The blocks of a model in the basis that the pipeline chose; the rest is not looked at."""
    made = make_rotation(rotation, model.config.hidden_size, recipe.scheme, recipe.seed, torch.device("cpu"))
    arch = find_arch(model.config.model_type)
    for index, layer in enumerate(model.model.layers):
        if made is not None:
            rotate_block_(Block(index, arch.block_path(index), layer, arch, Heads.of(model.config)), made)
    return model


def norm_outputs(model: Any, path: str, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm gives before its bias, and what its block (of the final norm: itself) is fed."""
    norm = model.get_submodule(path)
    seen: dict[str, Tensor] = {}
    bias = getattr(norm, "bias", None)
    block = norm if path == "model.norm" else model.get_submodule(path.rpartition(".")[0])
    handles = [
        norm.register_forward_hook(lambda module, args, output: seen.update(out=output)),
        block.register_forward_pre_hook(lambda module, args, kwargs: seen.update(hidden=args[0]), with_kwargs=True),
    ]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return seen["out"].detach() if bias is None else (seen["out"] - bias).detach(), seen["hidden"]


def teacher_and_student(original: Any, stored: Any, path: str, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the norm at `path` with and without the original in front of it, and what tells sinks."""
    student, hidden = norm_outputs(stored, path, windows)
    module = "model.layers.2.mlp" if path == "model.norm" else path.replace("post_attention_layernorm", "self_attn")
    quantized = stored.get_submodule(module)
    stored.set_submodule(module, original.get_submodule(module))
    try:
        teacher, tail = norm_outputs(stored, path, windows)
    finally:
        stored.set_submodule(module, quantized)
    return teacher, student, tail if path == "model.norm" else hidden


def close(found: Tensor, wanted: Tensor, spread: Tensor) -> bool:
    """Within the storage at float16, and what absorbing scales at float16 does to norm outputs of size `spread`."""
    return bool(((found - wanted).abs() <= STEP * (wanted.abs() + spread)).all())


@pytest.mark.parametrize(("name", "rotation"), [("llama-tied", "none"), ("qwen2", "none"), ("qwen2", "groups")])
def test_norms_behind_quantized_linears_store_the_mean_shift_of_their_own_block(
    name: str, rotation: str, runs: Runs
) -> None:
    original, stored, windows = runs(name, "published", rotation)
    entries = packed_config_of(stored.config).modules
    assert [path for path, entry in entries.items() if isinstance(entry, NormBiasEntry)] == NORMS
    for path in NORMS:
        bias = stored.get_submodule(path).bias.detach()
        assert torch.equal(bias, bias.half().float())
        teacher, student, _ = teacher_and_student(original, stored, path, windows)
        wanted, spread = (teacher - student).flatten(0, 1).mean(0), student.abs().flatten(0, 1).mean(0)
        assert close(bias, wanted, spread), path
        assert not close(bias, -wanted, spread), path
        assert not close(bias, torch.zeros_like(bias), spread), path
        gated = (teacher - student)[:, 1:].flatten(0, 1).mean(0)
        assert not close(bias, gated, spread), path
        if path != NORMS[0] and rotation == "none":
            # What drifted upstream is not in it.
            drifted = norm_outputs(original, path, windows)[0] - student
            assert not close(bias, drifted.flatten(0, 1).mean(0), spread), path


def sure(shift: Tensor, ordinary: Tensor) -> Iterator[tuple[int, float, bool]]:
    """(channel, mean over ordinary tokens, whether the gate is open) of channels that are not near its edges."""
    a, b = (shift[i::2][ordinary[i::2]].double().mean(0) for i in (0, 1))
    smaller = torch.where(a.abs() < b.abs(), a, b)
    larger = torch.where(a.abs() < b.abs(), b, a)
    overall = shift[ordinary].double().mean(0)
    for channel in torch.nonzero((smaller / larger - 0.5).abs() > 0.02).flatten().tolist():
        if float(larger[channel].abs()) > 1e-2:
            yield channel, float(overall[channel]), bool(smaller[channel] / larger[channel] > 0.5)


@pytest.mark.parametrize("path", NORMS)
def test_gated_norms_store_the_mean_over_ordinary_tokens_or_nothing(path: str, runs: Runs) -> None:
    original, stored, windows = runs("qwen2", "gated")
    bias = stored.get_submodule(path).bias.detach()
    teacher, student, hidden = teacher_and_student(original, stored, path, windows)
    ordinary = ordinary_tokens(hidden).view(windows.shape)
    assert not bool(ordinary[:, 0].any())
    spread = student.abs().flatten(0, 1).mean(0)
    channels = list(sure(teacher - student, ordinary))
    assert len(channels) > 20
    assert len({is_open for _, _, is_open in channels}) == 2
    for channel, mean, is_open in channels:
        if is_open:
            assert abs(float(bias[channel]) - mean) <= STEP * (abs(mean) + float(spread[channel])), channel
        else:
            assert float(bias[channel]) == 0, channel


def test_a_method_without_mean_shift_stores_no_norm_bias(
    runs: Runs,
) -> None:
    _, stored, _ = runs("qwen2", "none")
    assert not any(isinstance(entry, NormBiasEntry) for entry in packed_config_of(stored.config).modules.values())
    assert not any("norm.bias" in name for name in stored.state_dict())


def test_gate_refuses_a_single_window_that_has_no_other_half() -> None:
    y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    outputs = [(y + 1, y, torch.ones(32, dtype=torch.bool))]
    assert float((MeanShift("published")(outputs, 32) - 1).abs().max()) < 1e-5
    with pytest.raises(BadRecipe, match="use at least 2 windows"):
        MeanShift("gated")(outputs, 32)
