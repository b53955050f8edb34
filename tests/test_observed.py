"""What rounders are told of inputs: those of the stored model so far, and how far they are from the original's.

Recomputed from the two models alone, whole, by hooks on their linears.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import subnibble
from subnibble import Recipe
from subnibble.calibrate.windows import calibration_windows
from subnibble.methods import METHODS
from subnibble.methods.method import Method, Steps
from subnibble.methods.none import Options
from subnibble.rounding.rounder import Rounding
from subnibble.rounding.rtn import RTN
from subnibble.scheme import Scheme

READERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
Seen = dict[str, Tensor]


@dataclass
class Listener:
    """Rounds to nearest and keeps what it is told, by what it was told of."""

    told: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    needs_gram = True
    needs_drift = True

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        assert gram is not None
        assert drift is not None
        self.told[where] = gram.clone(), drift.clone()
        return RTN()(weight, None, scheme, where)

    def of(self, path: str) -> tuple[Tensor, Tensor]:
        """Gram matrix and drift of the linear at `path`, told of it alone or among those that share its input."""
        block, _, name = path.partition(".self_attn.") if ".self_attn." in path else path.partition(".mlp.")
        found = [told for where, told in self.told.items() if where.startswith(f"{block}.") and name in where]
        assert len(found) == 1
        return found[0]


def inputs(model: Any, windows: Tensor) -> Seen:
    """(tokens, channels) of what each linear of the blocks is fed, by its path."""
    seen: Seen = {}
    handles = [
        model.get_submodule(f"model.layers.{i}.{reader}").register_forward_pre_hook(
            lambda module, args, key=f"model.layers.{i}.{reader}": seen.update({key: args[0].flatten(0, 1).double()})
        )
        for i in range(3)
        for reader in READERS
    ]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return seen


def on_stored_states(original: Any, stored: Any, windows: Tensor) -> Seen:
    """The fault of running the original's blocks on the quantized model's hidden states."""
    seen: Seen = {}
    for index in range(3):
        quantized = stored.model.layers[index]
        stored.model.layers[index] = original.model.layers[index]
        found = inputs(stored, windows)
        stored.model.layers[index] = quantized
        seen |= {path: x for path, x in found.items() if path.startswith(f"model.layers.{index}.")}
    return seen


def close(found: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether a sum of products, in float32, is leftᵀ right as exactly as one can be had."""
    bound = 64 * torch.finfo(torch.float32).eps * (left.abs().T @ right.abs())
    return bool(((found.double() - left.T @ right).abs() <= bound + 1e-7).all())


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_rounders_are_told_of_stored_inputs_and_their_drift(
    name: str, folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    method = Method("listening", "a test", "a test", Options, lambda options: Steps(listener))
    monkeypatch.setitem(METHODS, "listening", method)
    recipe = Recipe(
        method="listening", bits=3, group_size=16, calibration=str(token_file), num_windows=6, window=32,
        dtype="float32", device="cpu",
    )  # fmt: skip
    subnibble.quantize(folders[name], tmp_path / "out", recipe)
    windows = calibration_windows(str(token_file), lambda: None, 6, 32, recipe.seed, 96)
    both = (folders[name], tmp_path / "out")
    original, stored = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in both)
    now, wanted = inputs(stored, windows), inputs(original, windows)
    misled = on_stored_states(original, stored, windows)
    for path, x in now.items():
        gram, drift = listener.of(path)
        difference = wanted[path] - x
        assert close(gram, x, x), path
        assert close(drift, difference, x), path
        assert not close(gram, wanted[path], wanted[path]), path
        assert not close(drift, x, difference), path
        assert not close(drift, -difference, x), path
        if not path.startswith("model.layers.0."):
            assert not close(drift, misled[path] - x, x), path
