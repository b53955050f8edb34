"""Windows of tokens from text or token files: int64 (windows, length)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subnibble.calibrate.text import read_text
from subnibble.calibrate.tokens import check_vocabulary, text_ids
from subnibble.errors import CalibrationError
from subnibble.paths import expanded

_TOKEN_FILES = {".npy", ".safetensors"}


def calibration_windows(
    spec: str, load_tokenizer: Callable[[], Any], count: int, length: int, seed: int, vocabulary: int
) -> Tensor:
    """`count` windows drawn from `spec` without overlap, in an order set by `seed`.

    spec: a text file, a named set, or a file of token ids (.npy, or .safetensors with one tensor). A 2-D token
    array is a list of windows and is cut to `length`. vocabulary: ids must be below it.
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
            f"{spec} holds {available.shape[0]} windows of {length} tokens and {count} are asked for; "
            f"use --num-windows {available.shape[0]}, a shorter --window, or more text"
        )
    order = torch.randperm(available.shape[0], generator=torch.Generator().manual_seed(seed))
    return available[order[:count]]


def evaluation_windows(spec: str, tokenizer: Any, length: int, limit: int | None) -> Tensor:
    """Consecutive windows of the whole text, at most `limit`, without special tokens; the tail is dropped."""
    windows = cut_windows(tokenize(tokenizer, read_text(spec, "test"), spec), length, spec)
    return windows if limit is None else windows[:limit]


def check_positions(length: int, config: Any, prefix: int = 0) -> None:
    """Raise `CalibrationError` if windows of `length` tokens are longer than the model was made for.

    prefix: tokens of a system prompt before them.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and prefix and length + prefix > most:
        raise CalibrationError(
            f"windows of {length} tokens behind a system prompt of {prefix} are longer than the model's {most} "
            f"positions; use a shorter prompt{f', or --window {most - prefix}' if prefix < most else ''}"
        )
    if most is not None and length > most:
        raise CalibrationError(
            f"windows of {length} tokens are longer than the model's {most} positions; use --window {most}"
        )


def tokenize(tokenizer: Any, text: str, where: str = "the text") -> Tensor:
    """Token ids of the whole text in one piece, without special tokens: int64 (tokens,)."""
    return torch.tensor(text_ids(tokenizer, text, where), dtype=torch.int64)


def cut_windows(tokens: Tensor, length: int, where: str) -> Tensor:
    """Consecutive windows (count, length) of tokens (n,); `CalibrationError` if there is not even one."""
    count = tokens.shape[0] // length
    if count == 0:
        raise CalibrationError(
            f"{where} holds {tokens.shape[0]} tokens, less than one window of {length}; "
            "pass more text or a shorter --window"
        )
    return tokens[: count * length].view(count, length)


def _read_tokens(path: Path) -> Tensor:
    if not path.is_file():
        raise CalibrationError(f"{path}: no such token file")
    try:
        if path.suffix.lower() == ".npy":
            tokens = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64, casting="safe"))
        else:
            from safetensors.torch import load_file

            (tokens,) = load_file(path).values()
    # numpy and safetensors raise ValueError, TypeError or their own error on a damaged or unfit file.
    except Exception as error:
        raise CalibrationError(
            f"{path}: expected one array of whole numbers, as .npy or .safetensors ({error})"
        ) from error
    if tokens.dim() not in (1, 2) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise CalibrationError(
            f"{path}: expected token ids, (tokens,) or (windows, tokens); found {tokens.dtype} {tuple(tokens.shape)}"
        )
    return tokens.to(torch.int64)
