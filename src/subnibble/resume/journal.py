"""The journal of a run: which steps are finished, and their results.

A journal is one JSON file in the run's work folder, replaced as a whole after each step:

    {"journal": 1, "sha256": "...", "content": {"command", "fingerprint", "started", "steps": {name: step}}}

A step holds a JSON value and, possibly, the description of a file of tensors beside the journal. The file of tensors is
on the disk before the journal names it, and is removed only after no step names it any more.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from subnibble.errors import BadJournal
from subnibble.resume.durable import INCOMPLETE, remove, write_file
from subnibble.resume.tensor_file import TensorFile, read_tensors, write_tensors

JOURNAL, VERSION = "journal.json", 1
# Ending of the files of tensors beside the journal.
_TENSORS = ".tensors"


@dataclass(frozen=True)
class Step:
    """A finished step. value: its result, for JSON. file: its tensors, or None."""

    value: Any
    file: TensorFile | None = None


class Journal:
    """The finished steps of one run, in the order in which they were recorded.

    folder: the run's work folder, where the journal and its files of tensors lie.
    command: name of the command.
    fingerprint: everything that the run's result depends on, for JSON; see `fingerprint.py`.
    started: when the run began, in seconds since 1970.
    is_optional (attribute): whether the run may go on without a journal if the disk is full.
    """

    def __init__(
        self, folder: Path, command: str, fingerprint: Mapping[str, Any], started: float | None = None
    ) -> None:
        self.folder, self.command, self.fingerprint = folder, command, fingerprint
        self.started = time.time() if started is None else started
        self.is_optional = False
        self._steps: dict[str, Step] = {}
        self._written = 0

    @property
    def steps(self) -> Mapping[str, Step]:
        """Finished steps by name."""
        return self._steps

    @property
    def last(self) -> str:
        """Name of the step that was recorded last, "-" if there is none."""
        return list(self._steps)[-1] if self._steps else "-"

    def value(self, name: str) -> Any:
        """The result of a step, None if it is not finished."""
        step = self._steps.get(name)
        return None if step is None else step.value

    def tensors(self, name: str) -> list[Tensor]:
        """Read the tensors of a finished step, on the CPU; empty if it has none. Raises `BadJournal` if damaged."""
        file = self._steps[name].file
        if file is None:
            return []
        try:
            return read_tensors(self.folder, file)
        except (OSError, ValueError) as error:
            raise damaged(self.folder / file.name, error) from error

    def record(self, values: Mapping[str, Any], tensors: Sequence[Tensor] = (), forget: Sequence[str] = ()) -> None:
        """Record finished steps, all or none, in place of earlier ones of the same names.

        values: name of each step -> its result, for JSON.
        tensors: tensors of the last of them.
        forget: names of steps whose tensors are not needed any more; their values stay.
        """
        file = None
        if tensors:
            # A new name, because the old file must stay until the journal names the new one.
            self._written += 1
            file = write_tensors(self.folder, f"{self._written}{_TENSORS}", tensors)
        for other in forget:
            if other in self._steps:
                self._steps[other] = Step(self._steps[other].value)
        for name, value in values.items():
            self._steps.pop(name, None)
            self._steps[name] = Step(value)
        self._steps[self.last] = Step(self._steps[self.last].value, file)
        self._write()
        self.tidy()

    def amend(self, name: str, value: Any) -> None:
        """Replace the result of a finished step; its tensors stay."""
        self._steps[name] = Step(value, self._steps[name].file)
        self._write()

    def tidy(self) -> None:
        """Remove files of tensors that no step names, and incomplete files: a run that was killed leaves them."""
        named = {step.file.name for step in self._steps.values() if step.file is not None}
        for path in sorted(self.folder.iterdir()):
            is_tensors = path.suffix == _TENSORS and path.name not in named
            if path.is_file() and (is_tensors or path.suffix == INCOMPLETE):
                remove(path)

    def _write(self) -> None:
        steps = {
            name: {"value": step.value, "file": None if step.file is None else step.file.to_json()}
            for name, step in self._steps.items()
        }
        content = {
            "command": self.command, "fingerprint": self.fingerprint, "started": self.started, "steps": steps,
        }  # fmt: skip
        whole = {"journal": VERSION, "sha256": _digest(content), "content": content}
        write_file(self.folder / JOURNAL, [json.dumps(whole).encode()])

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """Read the journal of a work folder, None if there is none.

        Raises `BadJournal` for a journal of another version, a damaged or a truncated one.
        """
        path = folder / JOURNAL
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise damaged(path, error) from error
        try:
            whole = json.loads(text)
            version = whole["journal"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        if version != VERSION:
            raise BadJournal(
                f"{path} is a journal of version {version!r} and this subnibble reads version {VERSION}; finish the "
                "run with the release that began it, or start anew with --resume never"
            )
        try:
            content = whole["content"]
            if _digest(content) != whole["sha256"]:
                raise ValueError("its content does not have the SHA-256 that it names")
            journal = cls(folder, content["command"], content["fingerprint"], content["started"])
            for name, step in content["steps"].items():
                file = None if step["file"] is None else TensorFile.from_json(step["file"])
                journal._steps[name] = Step(step["value"], file)
                if file is not None:
                    journal._written = max(journal._written, int(file.name.removesuffix(_TENSORS)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error) from error
        return journal


def damaged(path: Path, error: Exception) -> BadJournal:
    """The error for a file of a run that is missing or not what was written."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return BadJournal(f"{path} is damaged ({reason}), so the run cannot be resumed; start anew with --resume never")


def _digest(content: Any) -> str:
    # Keys keep their order in JSON, so the text after a round trip is the same.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
