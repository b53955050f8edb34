"""Evaluate a checkpoint: load it, score it on a text, count its bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.calibrate.prompt import prefix_ids
from subnibble.calibrate.tokens import bos_token, check_vocabulary
from subnibble.calibrate.windows import check_positions, evaluation_windows
from subnibble.checkpoint.edit import REPORT, read_report
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.original import check_original
from subnibble.checkpoint.size import cache_bytes, measure
from subnibble.checkpoint.source import Source
from subnibble.errors import BadArgument, BadRecipe, CheckpointError
from subnibble.evaluation.layer_error import layer_errors
from subnibble.evaluation.perplexity import check_vocabularies, score
from subnibble.generate.prefix import attach_prefix_, same_prefix_
from subnibble.given import check_types, described, plain
from subnibble.hf import load_model, memory_bytes
from subnibble.hf.attention import attached_cache, change_scheme_
from subnibble.progress import Progress, given_progress
from subnibble.recipe import Recipe
from subnibble.report.clock import Clock, peak_memory
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

_TYPES = {
    "text": str, "window": int, "max_windows": (int, type(None)), "device": str, "dtype": str,
    "kv_bits": (int, type(None)), "kv": Mapping, "system_prompt": (str, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What to score on, and how. text: a file or named set. window: tokens. max_windows: at most, None for all.

    device, dtype: where and in which type to compute, see `device.py`. kv_bits, kv: code the KV cache so, whatever the
    checkpoint says, as in `Recipe`; None and nothing leave it at that. system_prompt: put the model behind it, see
    `calibrate/prompt.py`; its keys and values are the model's own.
    """

    text: str
    window: int = 2048
    max_windows: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    kv_bits: int | None = None
    kv: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for key in ("text", "device", "dtype", "system_prompt"):
            object.__setattr__(self, key, plain(getattr(self, key)))
        check_types(self, _TYPES)
        if self.window < 2 or (self.max_windows is not None and self.max_windows < 1):
            raise BadRecipe(
                f"window is {self.window} and max_windows {self.max_windows}; "
                "--window must be at least 2 and --max-windows at least 1"
            )

    @classmethod
    def of(cls, given: AnyEvaluation) -> Evaluation:
        """The evaluation that a caller means: one, a table of its keys, or what its text is."""
        if isinstance(given, Evaluation):
            return given
        if isinstance(given, Mapping):
            known = [item.name for item in fields(cls)]
            if unknown := sorted(set(given) - set(known), key=str):
                raise BadRecipe(f"unknown evaluation key {unknown[0]!r}; known: {', '.join(known)}")
            return cls(**{"text": None, **given})
        if isinstance(given, str | Path):
            return cls(str(given))
        raise BadArgument(
            f'evaluation is {described(given)}; give an Evaluation, as Evaluation("wikitext2", window=2048), a table '
            "of its keys, a text file or a named set"
        )

    def windows(self, source: Source, tokenizer: Any, prefix: PrefixIds | None) -> Tensor:
        """The windows, in the tokens of `source`, whose tokenizer is given. prefix: what they will stand behind."""
        check_positions(self.window, source.config, 0 if prefix is None else len(prefix.ids))
        windows = evaluation_windows(self.text, tokenizer, self.window, self.max_windows)
        check_vocabulary(windows, source.config.vocab_size, self.text)
        bos = bos_token(tokenizer)
        if bos is not None:
            check_vocabulary(torch.tensor([bos]), source.config.vocab_size, "the tokenizer's BOS token")
        return windows


# What Python calls take for an evaluation.
AnyEvaluation = Evaluation | Mapping[str, Any] | str | Path


def prepare_(model: Any, kv_bits: int | None, kv: Mapping[str, Any], prefix: PrefixIds | None) -> None:
    """Put a loaded model on a coded cache and behind a prefix, as far as they are asked for.

    kv_bits, kv: as in `Evaluation`; kv alone changes settings of the cache that the model has. prefix: None for the
    model's own.
    """
    attached = attached_cache(model)
    scheme = None if attached is None else attached.scheme
    if kv_bits is not None:
        scheme = Recipe(kv_bits=kv_bits, kv=kv).cache_scheme()
    elif kv and scheme is not None:
        scheme = CacheScheme.from_dict({**scheme.to_dict(), **kv})
    elif kv:
        raise BadRecipe(f"the model's KV cache is not coded, and has no {next(iter(kv))}; give --kv-bits, too")
    if prefix is not None:
        attach_prefix_(model, scheme, prefix)
    elif kv_bits is not None or kv:
        change_scheme_(model, scheme)


def evaluate(
    model: str | Path | Source,
    evaluation: AnyEvaluation,
    reference: str | Path | Source | None = None,
    *,
    layers: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity, bits, sizes and cost of `model`; with a `reference`, behind the same system prompt, how far it is
    from it.

    layers: add each packed linear's output error against the reference's; linears that were stored in another basis
    (rotated, channels scaled) have none.
    """
    clock, evaluation, told = Clock(), Evaluation.of(evaluation), given_progress(progress)
    if layers and reference is None:
        raise BadRecipe("--layers compares with the original; pass --reference MODEL")
    source, theirs = open_source(model), None if reference is None else open_source(reference, "reference")
    moved = _moved(source.path) if layers else set()
    if layers and theirs is not None:
        check_original(theirs, source)
    size = measure(source)
    packed, tokenizer = packed_config_of(source.config), source.load_tokenizer()
    asked = None if evaluation.system_prompt is None else prefix_ids(evaluation.system_prompt, tokenizer)
    windows = evaluation.windows(source, tokenizer, asked or (None if packed is None else packed.prefix))
    loaded = load_model(source, evaluation.dtype, evaluation.device)
    prepare_(loaded, evaluation.kv_bits, evaluation.kv, asked)
    original = None if theirs is None else load_model(theirs, evaluation.dtype, evaluation.device)
    if original is not None:
        check_vocabularies(loaded, original)
        same_prefix_(loaded, original)
    scores = score({"model": loaded}, windows, bos_token(tokenizer), original, told)["model"]
    found = scores.to_dict() | size.to_dict()
    found |= {
        "text": evaluation.text,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "memory_bytes": memory_bytes(loaded),
        **_attached_facts(loaded),
    }
    if layers:
        found["output_errors"] = layer_errors(loaded, original, windows, moved)
    return found | {"seconds": clock.seconds()["total"], "peak_memory": peak_memory()}


def _attached_facts(model: Any) -> dict[str, Any]:
    """What the model ran on: bytes of a token in its KV cache, tokens of its prefix."""
    attached = attached_cache(model)
    if attached is None:
        return {"cache_bytes": cache_bytes(model.config, None), "prefix_tokens": 0}
    tokens = 0 if attached.prefix is None else len(attached.prefix.ids)
    return {"cache_bytes": cache_bytes(model.config, attached.scheme), "prefix_tokens": tokens}


def _moved(folder: Path) -> set[str]:
    """Paths of the linears that the folder's report.json says are in another basis than the original's."""
    file, report = folder / REPORT, read_report(folder)
    if not report:
        raise BadRecipe(
            f"--layers needs {file}, which says what linears may be compared; it compares a folder that "
            "`subnibble quantize` wrote with the original"
        )
    try:
        linears = report["linears"]
        moved = {linear["path"] for linear in linears if linear.get("moved", False)}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); quantize the model again") from error
    if len(moved) == len(linears):
        raise BadRecipe(
            f"--layers: all linears of {folder} are stored in another basis than the original's (rotated, or channels "
            "scaled); their errors, as measured while quantizing, are in report.json"
        )
    return moved
