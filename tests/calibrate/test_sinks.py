"""Sink tokens by massive activations, and the prefix that is made of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from subnibble import Recipe, quantize
from subnibble.calibrate.prompt import prefix_ids, sink_prefix
from subnibble.calibrate.sinks import ordinary_tokens, sink_tokens
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.opening import open_source
from subnibble.errors import BadRecipe, CalibrationError

SITE = SimpleNamespace(name="mlp_hidden")


class Stream:
    """Gives out planted activations in batches."""

    def __init__(self, activations: Tensor) -> None:
        self._activations = activations

    def at(self, site: object) -> Iterator[Tensor]:
        assert site is SITE
        for batch in self._activations.split(2):
            yield batch.flatten(0, 1)


def blocks(*massive: list[tuple[int, int]]) -> list[tuple[SimpleNamespace, Stream]]:
    """Blocks of 10 windows of 6 tokens; at these positions (window, token) one channel is a hundred times larger."""
    samples = []
    for positions in massive:
        x = torch.ones(10, 6, 4)
        for window, token in positions:
            x[window, token, 2] = -100
        samples.append((SimpleNamespace(arch=SimpleNamespace(site={SITE.name: SITE}.get)), Stream(x)))
    return samples


WINDOWS = torch.arange(60).view(10, 6)


def test_the_first_place_counts_and_gives_no_token() -> None:
    assert sink_tokens(blocks([(window, 0) for window in range(10)]), WINDOWS) == ()


def test_as_many_tokens_as_the_block_with_most_of_them_needs() -> None:
    windows = WINDOWS.clone()
    windows[:, 3], windows[:5, 4], windows[5:, 4] = 71, 72, 73
    first = [(window, token) for window in range(10) for token in (0, 3, 4)]
    assert sink_tokens(blocks([(0, 0)], first), windows) == (71, 72, 73)
    assert sink_tokens(blocks([(window, 3) for window in range(10)], [(0, 4)]), windows) == (71,)


def test_a_token_that_is_rarely_a_sink_is_none() -> None:
    windows = torch.arange(240).view(40, 6)
    one = blocks([])[0]
    x = torch.ones(40, 6, 4)
    x[:, 0, 1] = 100
    x[3, 2, 1] = 100
    assert sink_tokens([(one[0], Stream(x))], windows) == ()
    x[4:8, 2, 1] = 100
    windows[3:8, 2] = 7
    assert sink_tokens([(one[0], Stream(x))], windows) == (7,)


def test_activations_below_the_factor_are_ordinary() -> None:
    (block, _), x = blocks([])[0], torch.ones(10, 6, 4)
    x[:, 2] = 63
    assert sink_tokens([(block, Stream(x))], WINDOWS) == ()


def test_bos_comes_last_and_once(folders: dict[str, Path]) -> None:
    tokenizer = open_source(folders["llama"]).load_tokenizer()
    assert sink_prefix((5, 9), tokenizer).ids == (5, 9)
    tokenizer.add_special_tokens({"eos_token": "w8"})
    assert sink_prefix((5, 9), tokenizer).ids == (5, 9, 8)
    tokenizer.add_special_tokens({"bos_token": "w9"})
    assert sink_prefix((5, 9), tokenizer).ids == (5, 9)
    assert sink_prefix((), tokenizer).ids == (9,)


def test_a_model_without_sinks_and_bos_has_no_such_prefix(folders: dict[str, Path], token_file: Path) -> None:
    tokenizer = open_source(folders["llama"]).load_tokenizer()
    with pytest.raises(BadRecipe, match='leave "auto" out'):
        sink_prefix((), tokenizer)
    with pytest.raises(BadRecipe, match="found in calibration text"):
        prefix_ids("auto", tokenizer)


def test_a_recipe_finds_its_prefix(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        method="none", system_prompt="auto", calibration=str(token_file), num_windows=4, window=16, device="cpu"
    )
    monkeypatch.setattr("subnibble.calibrate.sinks._FACTOR", 1.5)
    report = quantize(folders["llama"], tmp_path / "out", recipe)
    prefix = packed_config_of(open_source(tmp_path / "out").config).prefix
    assert len(prefix.ids) == report.prefix_tokens > 0
    with pytest.raises(BadRecipe, match="set calibration"):
        quantize(folders["llama"], tmp_path / "other", replace(recipe, calibration=None))
    assert not (tmp_path / "other").exists()


def test_a_prefix_of_tokens_that_the_model_does_not_know_is_refused(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    """A tokenizer whose BOS was added, and the embedding not resized."""
    source = tmp_path / "model"
    shutil.copytree(folders["llama"], source)
    tokenizer = open_source(source).load_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(source)
    recipe = Recipe(method="none", system_prompt="auto", calibration=str(token_file), num_windows=2, window=16)
    with pytest.raises(CalibrationError, match="the prefix of sink tokens: token ids run from 96"):
        quantize(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_windows_of_other_sizes_do_not_change_what_is_a_sink_in_one() -> None:
    """A window of small activations beside one of large ones: each has its own median."""
    hidden = torch.ones(2, 6, 4)
    hidden[1] *= 1000
    hidden[0, 3] *= 50
    together = ordinary_tokens(hidden)
    alone = torch.cat([ordinary_tokens(window.unsqueeze(0)) for window in hidden])
    assert torch.equal(together, alone)
    assert together[0].tolist() == [False, True, True, False, True, True]
    assert together[1].tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("batch", [1, 2, 5, 10])
def test_sinks_are_the_same_for_every_batching(batch: int) -> None:
    samples = blocks([(window, 3) for window in range(10)])
    block, stream = samples[0]
    # Half of the windows are of another size altogether.
    stream._activations[5:] *= 1e4
    windows = WINDOWS.clone()
    windows[:, 3] = 7
    stream.at = lambda site: (part.flatten(0, 1) for part in stream._activations.split(batch))
    assert sink_tokens([(block, stream)], windows) == (7,)


def test_first_tokens_and_huge_ones_are_no_ordinary_tokens() -> None:
    hidden = torch.ones(3, 5, 4)
    hidden[1, 2] = -9.9
    hidden[1, 3] = 10.1
    hidden[2, 4, 0] = 1000
    hidden[0, 0] = 1000
    expected = torch.ones(3, 5, dtype=torch.bool)
    expected[:, 0] = False
    expected[1, 3] = expected[2, 4] = False
    assert torch.equal(ordinary_tokens(hidden), expected)
    assert torch.equal(ordinary_tokens(hidden.bfloat16()), expected)
    # It is the size beside the other tokens' that counts.
    assert torch.equal(ordinary_tokens(hidden * 1e4), expected)
