"""Calibration windows of a run: cut from a text or a token file, or written by the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subnibble.arch.site import Heads
from subnibble.calibrate.kept_ids import keep_windows, kept_windows
from subnibble.calibrate.openings import openings
from subnibble.calibrate.sampling import SELF, WindowSampling
from subnibble.calibrate.windows import calibration_windows
from subnibble.checkpoint.source import Source
from subnibble.device import free_memory
from subnibble.generate.backend import Backend
from subnibble.generate.choice import native_or_torch
from subnibble.generate.native_backend import NativeBackend
from subnibble.generate.settings import stop_ids, stored_settings
from subnibble.generate.torch_backend import TorchBackend
from subnibble.generate.windows import Order, write_windows
from subnibble.hf import load_model
from subnibble.progress import Progress
from subnibble.recipe import Recipe
from subnibble.report import SampledReport
from subnibble.resume import fingerprint
from subnibble.resume.interrupt import safe_point, stop_requested
from subnibble.resume.journal import Journal
from subnibble.resume.keeper import Keeper
from subnibble.tensor.cache_scheme import PrefixIds

# Windows that the native step runs at once. More are hardly faster, and each has its own keys and values.
_BATCH = 16
# Share of the free memory that their keys and values may take.
_CACHE_SHARE = 0.25
# Names of the steps in the journal: finished windows while others are missing; all windows.
SAMPLING, SAMPLED = "sampling", "sampled windows"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Windows:
    """The calibration windows of a run, known before it begins: as token ids, or as what the model is to write.

    ids: (windows, tokens) int64, None without calibration and for windows that the model writes.
    written: what the model writes, or None.
    """

    ids: Tensor | None = None
    written: Written | None = None

    @property
    def fingerprint(self) -> str | None:
        """What the ids depend on, for the fingerprint of a run; None without calibration."""
        return fingerprint.tokens(self.ids) if self.written is None else self.written.digest


@dataclass(frozen=True)
class Written:
    """Windows that a model is to write.

    source: the unquantized model.
    order: what it writes.
    count: number of windows.
    dtype, device: of computation.
    """

    source: Source
    order: Order
    count: int
    dtype: torch.dtype
    device: torch.device

    @property
    def digest(self) -> str:
        """A digest of the order; with model files, dtype and machine, it determines the ids."""
        order = self.order
        settings = {**order.sampling.to_dict(), "count": self.count, "length": order.length, "seed": order.seed}
        return f"self {fingerprint.digest({**settings, 'openings': order.openings.digest})}"


def planned_windows(
    recipe: Recipe,
    source: Source,
    load_tokenizer: Callable[[], Any],
    prefix: PrefixIds | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Windows:
    """The windows that a recipe asks for. Reads text, but runs no model.

    recipe: resolved: its calibration is None only if no step needs data, and its sampling has a `start`.
    source: the unquantized model.
    load_tokenizer: returns the tokenizer.
    prefix: the prompt prefix before every window, None for none or if it is not known yet.
    dtype, device: of computation.
    Raises `CalibrationError` for text that cannot be read or is too short.
    """
    vocabulary = int(source.config.vocab_size)
    if recipe.calibration is None:
        return Windows()
    if recipe.calibration != SELF:
        ids = calibration_windows(
            recipe.calibration, load_tokenizer, recipe.num_windows, recipe.window, recipe.seed, vocabulary
        )
        return Windows(ids)
    ends = stop_ids(stored_settings(source))
    sampling = WindowSampling.from_dict(recipe.sampling)
    order = Order(openings(sampling, load_tokenizer(), vocabulary, ends, prefix), sampling, recipe.window, recipe.seed)
    return Windows(None, Written(source, order, recipe.num_windows, dtype, device))


def written_windows(
    written: Written, journal: Journal, facts: Callable[[], Mapping[str, Any]], progress: Progress
) -> tuple[Tensor, SampledReport]:
    """The ids of windows that the model writes, (count, length) int64, and how they were written.

    Those of an earlier run are read from the journal, finished windows also if others are missing.

    journal: of the run.
    facts: returns further values for each step in the journal.
    """
    if (value := journal.value(SAMPLED)) is not None:
        (ids,) = journal.tensors(SAMPLED)
        return ids.long(), SampledReport(**value["report"])
    key = fingerprint.digest({
        "model": fingerprint.files(written.source.files()), "order": written.digest, "dtype": str(written.dtype),
        "machine": fingerprint.machine(written.device),
    })  # fmt: skip
    kept = kept_windows(key)
    if kept is None:
        report, ids = _written(written, Keeper(journal, SAMPLING, facts), progress)
        keep_windows(key, ids, report.backend, report.reason)
    else:
        ids, backend, reason = kept
        report = SampledReport(backend, reason, *ids.shape)
    # `SAMPLING` comes before: the journal goes on from its last step.
    journal.record({SAMPLED: {"report": report.to_dict(), **facts()}}, [ids.int()], forget=[SAMPLING])
    safe_point()
    return ids, report


def _written(written: Written, keeper: Keeper, progress: Progress) -> tuple[SampledReport, Tensor]:
    """Load the model and let it write the windows."""
    order, count = written.order, written.count
    model = load_model(written.source, written.dtype, written.device)
    name, reason = native_or_torch(model)
    if name == "torch":
        _log.warning("the model writes its calibration windows in torch, which is slow: %s", reason)
    backend: Backend = NativeBackend(model) if name == "native" else TorchBackend(model)
    batch = _batch(written, model.config) if name == "native" else 1
    kept = keeper.kept()
    done = torch.empty(0, order.length, dtype=torch.int32) if kept is None else kept[1][0]
    while len(done) < count:
        numbers = range(len(done), min(len(done) + batch, count))
        on_step = partial(_on_step, done, numbers, count, keeper, progress)
        done = torch.cat([done, write_windows(backend, order, numbers, on_step).int()])
        keeper.keep(partial(_state, done))
    return SampledReport(name, reason, count, order.length), done.long()


def _on_step(done: Tensor, numbers: range, count: int, keeper: Keeper, progress: Progress, step: int) -> None:
    """Report a step, and stop if the user asked to; the windows that are being written are lost then.

    done: ids of the finished windows, (n, t).
    numbers: of the windows that are being written; step: number of tokens that each of them has.
    """
    tokens = done.numel() + step * len(numbers)
    doing = f"the model writes windows {numbers.start + 1} to {numbers.stop}, in tokens"
    progress(tokens, count * done.shape[1], doing)
    if stop_requested() and len(done):
        keeper.keep(partial(_state, done))
    safe_point()


def _state(done: Tensor) -> tuple[None, list[Tensor]]:
    return None, [done]


def batch_bytes(config: Any, length: int, count: int) -> int:
    """Bytes of the keys and values, in float16, of the windows that run at once.

    config: of the model.
    length: tokens of a window.
    count: number of windows in all.
    """
    heads = Heads.of(config)
    return 2 * 2 * heads.key_value * heads.width * int(config.num_hidden_layers) * length * min(count, _BATCH)


def _batch(written: Written, config: Any) -> int:
    """Number of windows that run at once, by the memory for their keys and values."""
    window = batch_bytes(config, written.order.length, 1)
    return max(1, min(_BATCH, int(_CACHE_SHARE * free_memory(written.device)) // window))
