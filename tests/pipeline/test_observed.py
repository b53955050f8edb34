"""What rounders are told of inputs: those of the stored model so far, and how far they are from the original's.

Recomputed from the two models alone, whole, by hooks on their linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import subnibble
from subnibble import Recipe
from subnibble.arch.site import Role
from subnibble.calibrate.windows import calibration_windows
from subnibble.corrections.correction import Branch, Correction
from subnibble.corrections.salient import SalientColumns
from subnibble.device import DTYPES
from subnibble.methods import METHODS
from subnibble.methods.method import Method, Steps
from subnibble.methods.none import Options
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.rounding.rtn import RTN
from subnibble.runtime import activations, site_input
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.saliency import Saliency

READERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
Seen = dict[str, Tensor]


@dataclass
class Listener(Rounder):
    """Rounds to nearest and keeps what it is told, by what it was told of."""

    received: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    needs_gram = True
    needs_drift = True

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        assert gram is not None
        assert drift is not None
        self.received[where] = gram.clone(), drift.clone()
        return RTN()(weight, None, scheme, where)

    def of(self, path: str) -> tuple[Tensor, Tensor]:
        """Gram matrix and drift of the linear at `path`, told of it alone or among those that share its input."""
        block, _, name = path.partition(".self_attn.") if ".self_attn." in path else path.partition(".mlp.")
        result = [matrix for where, matrix in self.received.items() if where.startswith(f"{block}.") and name in where]
        assert len(result) == 1
        return result[0]


def inputs(model: Any, windows: Tensor) -> Seen:
    """(tokens, channels) of what each linear of the blocks is fed, by its path."""
    by_path: Seen = {}
    handles = [
        model.get_submodule(f"model.layers.{i}.{reader}").register_forward_pre_hook(
            lambda module, args, key=f"model.layers.{i}.{reader}": by_path.update({key: args[0].flatten(0, 1).double()})
        )
        for i in range(3)
        for reader in READERS
    ]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return by_path


def on_stored_states(original: Any, stored: Any, windows: Tensor) -> Seen:
    """The fault of running the original's blocks on the quantized model's hidden states."""
    by_path: Seen = {}
    for index in range(3):
        quantized = stored.model.layers[index]
        stored.model.layers[index] = original.model.layers[index]
        result = inputs(stored, windows)
        stored.model.layers[index] = quantized
        by_path |= {path: x for path, x in result.items() if path.startswith(f"model.layers.{index}.")}
    return by_path


def close(result: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether a sum of products, in float32, is leftᵀ right as exactly as one can be had."""
    bound = 64 * torch.finfo(torch.float32).eps * (left.abs().T @ right.abs())
    return bool(((result.double() - left.T @ right).abs() <= bound + 1e-7).all())


def listened(
    steps: Steps, folder: Path, tokens: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> tuple[Any, Tensor]:
    """What the steps store, loaded, and the calibration windows."""
    method = Method("listening", "a test", "a test", Options, lambda options: steps)
    monkeypatch.setitem(METHODS, "listening", method)
    usual = {"bits": 3, "group_size": 16, "num_windows": 6, "window": 32, "dtype": "float32", "device": "cpu"}
    recipe = Recipe(**{**usual, "method": "listening", "calibration": str(tokens), **values})
    subnibble.quantize(folder, out, recipe)
    windows = calibration_windows(str(tokens), lambda: None, 6, 32, recipe.seed, 96)
    return AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[recipe.dtype]), windows


@pytest.mark.parametrize("corrected", ["none", "published"], ids=["codes alone", "norms corrected"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_rounders_are_told_of_stored_inputs_and_their_drift(
    name: str,
    corrected: str,
    folders: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = Listener()
    steps = Steps(listener, mean_shift=corrected)
    stored, windows = listened(steps, folders[name], token_file, tmp_path / "out", monkeypatch, embedding_bits=8)
    original = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    now, target = inputs(stored, windows), inputs(original, windows)
    misled = on_stored_states(original, stored, windows)
    for path, x in now.items():
        gram, drift = listener.of(path)
        difference = target[path] - x
        assert close(gram, x, x), path
        assert close(drift, difference, x), path
        assert not close(gram, target[path], target[path]), path
        if corrected != "none" and path.endswith("up_proj"):
            # The fault of gathering statistics before the norm in front was corrected.
            bias = stored.get_submodule(path.replace("mlp.up_proj", "post_attention_layernorm")).bias.double()
            assert not close(gram, x - bias, x - bias), path
        assert not close(drift, x, difference), path
        assert not close(drift, -difference, x), path
        if not path.startswith("model.layers.0."):
            assert not close(drift, misled[path] - x, x), path


@dataclass(frozen=True)
class MeanAbsRecorder(Correction):
    """Keeps the mean magnitudes and Gram matrices that it receives, with the heights of the linears."""

    needs_data: ClassVar[bool] = True
    needs_mean_abs: ClassVar[bool] = True

    received: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list, compare=False)

    def branches(
        self, errors: Sequence[Tensor], gram: Tensor | None, mean_abs: Tensor | None, scheme: Scheme
    ) -> list[Branch | None]:
        assert gram is not None
        assert mean_abs is not None
        self.received.append(([len(error) for error in errors], gram.clone(), mean_abs.clone()))
        return super().branches(errors, gram, mean_abs, scheme)


def test_corrections_receive_the_mean_magnitudes_of_stored_inputs(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = MeanAbsRecorder()
    stored, windows = listened(
        Steps(RTN(), correction=heard), folders["llama"], token_file, tmp_path / "out", monkeypatch
    )
    now = inputs(stored, windows)
    assert len(heard.received) == len(now) == 12
    for (path, x), (_, gram, mean_abs) in zip(now.items(), heard.received, strict=True):
        assert close(gram, x, x), path
        torch.testing.assert_close(mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(mean_abs.double(), x.abs().amax(0), rtol=0.1)


@dataclass(frozen=True)
class GramHeard(Rounder):
    """Rounds to nearest and keeps the Gram matrices that it is told, by what it was told of."""

    received: dict[str, Tensor] = field(default_factory=dict, compare=False)
    needs_gram = True

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        assert gram is not None
        self.received[where] = gram.clone()
        return RTN()(weight, None, scheme, where)

    @property
    def first(self) -> Tensor:
        """Of the first site, which nothing before it has moved by a rounding step."""
        return next(
            gram for where, gram in self.received.items() if where.startswith("model.layers.0.") and "q_proj" in where
        )


@pytest.mark.parametrize("residual", ["none", "salient"])
def test_quantized_inputs_are_seen_as_the_runtime_codes_them(
    residual: str, folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, rank, heard = ActivationScheme(4, 16), 16, GramHeard()
    steps = Steps(heard, saliency=Saliency(), correction=SalientColumns(rank, residual=residual), inputs="quantized")
    stored, windows = listened(
        steps, folders["llama"], token_file, tmp_path / "out", monkeypatch, activation_bits=scheme.bits
    )
    linear = stored.model.layers[0].self_attn.q_proj
    entered: list[Tensor] = []
    linear.register_forward_pre_hook(lambda module, args: entered.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        stored(windows)
    x = entered[0][:, linear.gather.long()]
    once = activations.quantize(x, scheme).values()
    twice = once.clone()
    twice[:, :rank] += activations.quantize(x[:, :rank] - once[:, :rank], scheme).values()
    usual, other = (part.double() for part in ((once, twice) if residual == "none" else (twice, once)))
    assert close(heard.first, usual, usual)
    assert not close(heard.first, other, other)
    assert not close(heard.first, x.double(), x.double())


@pytest.mark.parametrize("online", [(), (Role.ATTENTION_IN,)], ids=["as it comes", "transformed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_of_inputs_are_not_rounded_to_the_streams_type_before_the_gram_matrix(
    dtype: str,
    online: tuple[str, ...],
    folders: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme, heard = ActivationScheme(8, 16), GramHeard()
    steps = Steps(heard, inputs="quantized", online=online)
    stored, windows = listened(
        steps, folders["llama"], token_file, tmp_path / "out", monkeypatch, activation_bits=scheme.bits, dtype=dtype
    )
    linear = stored.model.layers[0].self_attn.q_proj
    entered: list[Tensor] = []
    linear.register_forward_pre_hook(lambda module, args: entered.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        stored(windows)
    assert entered[0].dtype == DTYPES[dtype]
    quantized = activations.quantize(site_input.enter(entered[0], linear.linear.input), scheme)
    widths = [stop - start for start, stop in quantized.bounds]
    exact = quantized.numbers.double() * quantized.scales.double().repeat_interleave(torch.tensor(widths), 1)
    coarse = exact.to(DTYPES[dtype]).double()
    assert close(heard.first, exact, exact)
    assert not close(heard.first, coarse, coarse)
