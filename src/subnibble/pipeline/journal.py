"""What a quantization records in the journal of its run, and how it goes on from there.

    sampling       finished calibration windows, while the model writes others
    sampled windows   all of them
    survey         sink tokens and channel order, if asked for: both need passes of the full-precision model
    block 0, ...   shard, specs and reports of a block, and the streams after it
    final layers   the last shard, and the specs of all modules
    distilling     the state of the training loop; replaced again and again
    distilled      all learned tensors; rewriting the shards with them can be repeated

Survey, embedding and streams before the first block are computed again or read from here. Streams are stored rather
than computed again from the finished blocks: a pass through the packed blocks would not give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from subnibble.checkpoint.manifest import modules_from_dict, modules_to_dict
from subnibble.checkpoint.module_specs import Spec
from subnibble.checkpoint.writer import CheckpointWriter, Shard
from subnibble.distill.train import DISTILLED, DISTILLING, Distilled
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.store import StoredBlock
from subnibble.pipeline.streams import Streams
from subnibble.pipeline.survey import Survey, takes_passes
from subnibble.pipeline.windows import SAMPLED, Windows, written_windows
from subnibble.progress import Progress
from subnibble.report import BlockReport, LinearReport, SampledReport
from subnibble.report.clock import Clock, peak_memory
from subnibble.resume import fingerprint
from subnibble.resume.interrupt import safe_point, stop_requested
from subnibble.resume.keeper import Keeper
from subnibble.resume.pace import Pace
from subnibble.resume.run import Run
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.transforms.residual_order import ResidualOrder
from subnibble.transforms.rotate import ResidualEdit

_SURVEY, _FINAL = "survey", "final layers"


class QuantizationJournal:
    """The recorded steps of one quantization.

    run: the run, entered by the caller.
    resolved: the recipe on the model.
    writer: writes the checkpoint; it continues after the recorded shards.
    clock: counts the seconds of each step; it continues from the recorded seconds.
    blocks (attribute): finished blocks without their tensors, in order.
    """

    def __init__(self, run: Run, resolved: Resolved, writer: CheckpointWriter, clock: Clock) -> None:
        self._journal, self._resolved, self._writer, self._clock = run.journal, resolved, writer, clock
        self._pace = Pace()
        # Finished blocks that are not recorded yet, by the name of the step.
        self._pending: dict[str, Any] = {}
        self.blocks: list[StoredBlock] = []
        self._peak = 0
        shards = []
        for index in range(resolved.skeleton.num_blocks):
            value = self._journal.value(_block(index))
            if value is None:
                break
            self.blocks.append(_block_of(value))
            shards.append(Shard.from_json(value["shard"]))
        if (final := self._journal.value(_FINAL)) is not None:
            shards.append(Shard.from_json(final["shard"]))
        rewritten = self._journal.value(DISTILLED) or {"rewritten": {}}
        writer.continue_with(shards, rewritten["rewritten"])
        if self._journal.steps:
            last = self._journal.value(self._journal.last)
            clock.add(last["seconds"])
            self._peak = last["peak_memory"]

    @property
    def peak_memory(self) -> int:
        """Peak memory in bytes of this process and of the runs that it continues."""
        return max(self._peak, peak_memory())

    def windows(self, planned: Windows, progress: Progress) -> tuple[Tensor | None, SampledReport | None]:
        """The calibration windows, (n, t) token ids or None, and how the model wrote them, or None.

        Windows that the model writes are read from the journal, or written and recorded.
        """
        if planned.written is None:
            return planned.ids, None
        with self._clock.step("sample windows"):
            return written_windows(planned.written, self._journal, self._facts, progress)

    def survey(self, windows: Tensor | None) -> Survey | None:
        """The recorded survey, None if it is still to do. windows: (n, t) token ids, or None."""
        if not takes_passes(self._resolved, windows):
            return Survey(windows, self._resolved.rotation, self._resolved.prefix)
        value = self._journal.value(_SURVEY)
        if value is None:
            return None
        order, prefix = value["order"], value["prefix"]
        edit: ResidualEdit | None = self._resolved.rotation
        if order is not None:
            edit = ResidualOrder(torch.tensor(order, device=self._resolved.skeleton.device))
        return Survey(windows, edit, None if prefix is None else PrefixIds.from_dict(prefix))

    def record_survey(self, surveyed: Survey) -> None:
        """Record the survey."""
        edit, prefix = surveyed.edit, surveyed.prefix
        self._record({
            _SURVEY: {
                "order": edit.order.tolist() if isinstance(edit, ResidualOrder) else None,
                "prefix": None if prefix is None else prefix.to_dict(),
            }
        })  # fmt: skip

    def restore_(self, streams: Streams) -> None:
        """Advance the streams past the recorded blocks."""
        if not self.blocks:
            return
        name = _block(len(self.blocks) - 1)
        tensors = iter(self._journal.tensors(name))
        counts = self._journal.value(name)["streams"]
        streams.restore_({key: [next(tensors) for _ in range(count)] for key, count in counts.items()})

    def add_block(self, stored: StoredBlock, streams: Streams) -> None:
        """Write the shard of a block; record the block and the streams after it, if saving is due.

        Raises `KeyboardInterrupt` or `SystemExit` if the user asked to stop; everything is recorded then.
        """
        with self._clock.step("write"):
            shard = self._writer.write_shard(stored.tensors)
        index = len(self.blocks)
        self.blocks.append(stored.without_tensors())
        tensors = streams.tensors()
        self._pending[_block(index)] = {
            "shard": shard.to_json(),
            "modules": modules_to_dict(stored.specs),
            "linears": [asdict(linear) for linear in stored.linears],
            "tuned": None if stored.tuned is None else asdict(stored.tuned),
            "streams": {key: len(of_key) for key, of_key in tensors.items()},
        }
        if self._pace.is_due or stop_requested():
            with self._clock.step("journal"):
                self._pace.save(lambda: self._record_blocks([t for of_key in tensors.values() for t in of_key]))
        safe_point()

    def finished_layers(self, windows: Tensor | None) -> tuple[Survey, dict[str, Spec]] | None:
        """The survey and the specs of all modules by path, None if the final layers are not finished.

        windows: (n, t) token ids, or None.
        """
        value, surveyed = self._journal.value(_FINAL), self.survey(windows)
        return None if value is None or surveyed is None else (surveyed, modules_from_dict(value["modules"]))

    def add_final_layers(self, tensors: Mapping[str, Tensor], modules: Mapping[str, Spec]) -> None:
        """Write the last shard and record that all layers are finished.

        tensors: name -> tensor, of all layers outside the blocks.
        modules: path -> spec, of all modules of the model.
        """
        with self._clock.step("write"):
            shard = self._writer.write_shard(tensors)
        final = {"shard": shard.to_json(), "modules": modules_to_dict(modules)}
        self._record({**self._pending, _FINAL: final}, forget=[_block(index) for index in range(len(self.blocks))])
        self._pending = {}
        safe_point()

    def keeper(self) -> Keeper:
        """Keeps the state of distillation."""
        return Keeper(self._journal, DISTILLING, self._facts)

    @property
    def distilled(self) -> Distilled | None:
        """The result of distillation, None if it is not finished."""
        value = self._journal.value(DISTILLED)
        if value is None:
            return None
        return Distilled.of_state(value, self._journal.tensors(DISTILLED))

    def record_distilled(self, distilled: Distilled) -> None:
        """Record the result of distillation."""
        values, tensors = distilled.state()
        self._record({DISTILLED: {**values, "rewritten": {}}}, list(tensors), forget=[DISTILLING])
        safe_point()

    def record_checksum(self, shard: str, sha256: str) -> None:
        """Record the checksum of a shard with learned tensors, before the shard replaces the one without."""
        value = self._journal.value(DISTILLED)
        self._journal.amend(DISTILLED, {**value, "rewritten": {**value["rewritten"], shard: sha256}})

    def _record_blocks(self, tensors: list[Tensor]) -> None:
        if tensors:
            steps = self._journal.steps.items()
            earlier = [name for name, step in steps if step.file is not None and name != SAMPLED]
            self._record(self._pending, tensors, earlier)
        else:
            self._record(self._pending)
        self._pending = {}

    def _record(
        self, values: Mapping[str, dict[str, Any]], tensors: list[Tensor] | None = None, forget: list[str] | None = None
    ) -> None:
        facts = self._facts()
        self._journal.record({name: {**value, **facts} for name, value in values.items()}, tensors or [], forget or [])

    def _facts(self) -> dict[str, Any]:
        return {"seconds": self._clock.seconds(), "peak_memory": self.peak_memory}


def fingerprint_of(resolved: Resolved, windows: Windows) -> dict[str, Any]:
    """The inputs that determine the packed checkpoint. windows: for calibration."""
    return {
        "model": fingerprint.files(resolved.skeleton.source.files()),
        "recipe": resolved.recipe.to_dict(),
        "calibration tokens": windows.fingerprint,
        "system prompt": None if resolved.prefix is None else resolved.prefix.to_dict(),
        "versions": fingerprint.versions(),
        "machine": fingerprint.machine(resolved.skeleton.device),
    }


def _block(index: int) -> str:
    return f"block {index}"


def _block_of(value: Mapping[str, Any]) -> StoredBlock:
    """A recorded block, without tensors."""
    return StoredBlock(
        {},
        modules_from_dict(value["modules"]),
        tuple(LinearReport.from_dict(linear) for linear in value["linears"]),
        None if value["tuned"] is None else BlockReport.from_dict(value["tuned"]),
    )
