"""SmolLM2, a GGUF file of Q4_1, Q8_0 and F32: packed, it predicts what the dequantized file predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import subnibble
from subnibble.conversion.convert import DIFFERENCE
from subnibble.errors import CheckpointError
from subnibble.hf.loading import load_model
from subnibble.packaged.model import find_model


@pytest.mark.slow
def test_a_real_file_predicts_the_same(tmp_path: Path) -> None:
    try:
        file = find_model()
    except CheckpointError as error:
        pytest.skip(str(error))
    report = subnibble.convert(file, tmp_path / "out")
    assert report.size["effective_bits"] == 6.0
    assert max(linear.notes[DIFFERENCE] for linear in report.linears) <= 2.0**-20
    assert report.linears[-1].path == "model.embed_tokens"
    assert report.linears[-1].notes[DIFFERENCE] == 0.0
    ids = torch.arange(1000, 1064)[None]
    with torch.no_grad():
        own, wanted = (load_model(path, "float32")(ids).logits for path in (tmp_path / "out", file))
    assert float((own - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
