"""Cut text or token files into windows of tokens: int64 (windows, length)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subnibble.calibrate.kept_ids import kept_ids
from subnibble.calibrate.text import read_text
from subnibble.calibrate.tokens import check_vocabulary
from subnibble.errors import CalibrationError
from subnibble.paths import expanded

_TOKEN_FILES = {".npy", ".safetensors"}


def calibration_windows(
    spec: str, load_tokenizer: Callable[[], Any], count: int, length: int, seed: int, vocabulary: int
) -> Tensor:
    """Draw calibration windows without overlap: int64 (count, length).

    spec: a text file, a named set, or a file of token ids (.npy, or .safetensors with one tensor). The rows of a 2-D
        array of token ids are windows, which are cut to `length`.
    load_tokenizer: returns the tokenizer; called only for text.
    count: number of windows.
    length: tokens of a window.
    seed: seed of the draw and the order of the windows.
    vocabulary: rows of the embedding of the model; every token id must be below it.
    Raises `CalibrationError` if there are not enough tokens or windows.
    """
    if Path(spec).suffix.lower() in _TOKEN_FILES:
        tokens = _read_tokens(expanded(spec))
    else:
        text = read_text(spec, "calibration")
        tokens = tokenize(load_tokenizer(), text, spec)
    check_vocabulary(tokens, vocabulary, spec)
    available = tokens[:, :length] if tokens.dim() == 2 else cut_windows(tokens, length, spec)
    if available.shape[1] < length:
        raise CalibrationError(f"{spec}: its windows hold {available.shape[1]} tokens; lower --window from {length}")
    if available.shape[0] < count:
        raise CalibrationError(
            f"{spec} holds {available.shape[0]} windows of {length} tokens, but {count} are asked for; "
            f"use --num-windows {available.shape[0]}, a shorter --window, or more text"
        )
    order = torch.randperm(available.shape[0], generator=torch.Generator().manual_seed(seed))
    return available[order[:count]]


def evaluation_windows(spec: str, tokenizer: Any, length: int, limit: int | None) -> Tensor:
    """Consecutive windows of a text without special tokens, int64 (windows, length); the tail is dropped.

    spec: a text file or a named set.
    tokenizer: of transformers.
    length: tokens of a window.
    limit: largest number of windows, or None for the whole text.
    """
    windows = cut_windows(tokenize(tokenizer, read_text(spec, "test"), spec), length, spec)
    return windows if limit is None else windows[:limit]


def check_positions(length: int, config: Any, prefix: int = 0) -> None:
    """Raise `CalibrationError` if windows are longer than the positions of the model.

    length: tokens of a window.
    config: config of transformers.
    prefix: number of tokens of a system prompt before each window.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and prefix and length + prefix > most:
        raise CalibrationError(
            f"windows of {length} tokens after a system prompt of {prefix} are longer than the model's {most} "
            f"positions; use a shorter prompt{f', or --window {most - prefix}' if prefix < most else ''}"
        )
    if most is not None and length > most:
        raise CalibrationError(
            f"windows of {length} tokens are longer than the model's {most} positions; use --window {most}"
        )


def tokenize(tokenizer: Any, text: str, where: str = "the text") -> Tensor:
    """Token ids of the whole text in one piece, without special tokens: int64 (tokens,).

    tokenizer: of transformers.
    where: what the text is, for errors.
    """
    return kept_ids(tokenizer, text, where).to(torch.int64)


def cut_windows(tokens: Tensor, length: int, where: str) -> Tensor:
    """Cut tokens into consecutive windows, (count, length); the tail is dropped.

    tokens: token ids, (n,).
    length: tokens of a window.
    where: what the tokens are, for errors.
    Raises `CalibrationError` if there are fewer than `length` tokens.
    """
    count = tokens.shape[0] // length
    if count == 0:
        raise CalibrationError(
            f"{where} holds {tokens.shape[0]} tokens, less than one window of {length}; "
            "give more text or a shorter --window"
        )
    return tokens[: count * length].view(count, length)


def _read_tokens(path: Path) -> Tensor:
    if not path.is_file():
        raise CalibrationError(f"{path}: no such token file; give an existing .npy or .safetensors file")
    try:
        if path.suffix.lower() == ".npy":
            tokens = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64, casting="safe"))
        else:
            from safetensors.torch import load_file

            (tokens,) = load_file(path).values()
    # numpy and safetensors raise ValueError, TypeError or their own error types for a damaged or unsuitable file.
    except Exception as error:
        raise CalibrationError(
            f"{path}: expected one array of whole numbers, as .npy or .safetensors ({error})"
        ) from error
    if tokens.dim() not in (1, 2) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise CalibrationError(
            f"{path}: expected token ids, (tokens,) or (windows, tokens); found {tokens.dtype} {tuple(tokens.shape)}"
        )
    return tokens.to(torch.int64)
