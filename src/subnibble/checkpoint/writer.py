"""Write a checkpoint folder shard by shard; it appears under its final name only when it is complete.

Until then its files are in the work folder of a run (`resume/run.py`).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subnibble.checkpoint.checksums import file_checksum
from subnibble.checkpoint.manifest import QUANT_METHOD
from subnibble.checkpoint.weight_files import INDEX, SINGLE
from subnibble.errors import OutputError
from subnibble.resume.commit import contents, has_begun
from subnibble.resume.durable import make_folder, remove_folder, write_by
from subnibble.resume.journal import damaged
from subnibble.resume.places import work_folders
from subnibble.resume.run import Run

_CONFIG = "config.json"


@dataclass(frozen=True)
class Shard:
    """A written weight file.

    name: file name.
    sha256: its SHA-256, 64 hexadecimal digits.
    tensors: names of its tensors.
    bytes: bytes of the tensors, without the header.
    """

    name: str
    sha256: str
    tensors: tuple[str, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {"name": self.name, "sha256": self.sha256, "tensors": list(self.tensors), "bytes": self.bytes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Shard:
        """Read what `to_json` returned."""
        return cls(values["name"], values["sha256"], tuple(values["tensors"]), values["bytes"])


class CheckpointWriter:
    """A context manager that collects shards in the work folder of a run, until `commit`.

    Leaving the `with` block without `commit` removes the files, unless the run has recorded steps and can be resumed.

    final: the folder to write.
    shards: number of shards that will be written.
    replace: whether `commit` may replace an existing checkpoint at `final`.
    run: the run that writes `final`, entered by the caller; None: a run of its own, without a journal.
    folder: the folder in which the checkpoint grows.
    checksums: file name -> SHA-256 of each weight file written so far.
    """

    def __init__(self, final: Path, shards: int, replace: bool, run: Run | None = None) -> None:
        self.final = final.resolve()
        self._stack = ExitStack()
        self._run = run
        self.folder = Path()
        self._shards, self._written = shards, 0
        self._weight_map: dict[str, str] = {}
        self.checksums: dict[str, str] = {}
        self._bytes = 0
        self._replace = replace

    def __enter__(self) -> Self:
        check_output(self.final, self._replace)
        if self._run is None:
            self._run = self._stack.enter_context(Run(self.final, "write", {}))
        self.folder = self._run.checkpoint
        try:
            # Without a mode, so that the user's umask decides permissions.
            make_folder(self.folder)
        except OSError as error:
            self._stack.close()
            raise OutputError(f"{self.final}: cannot be created ({error.strerror}); choose another folder") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def continue_with(self, shards: Sequence[Shard], rewritten: Mapping[str, str]) -> None:
        """Go on after these shards, which an earlier run wrote; remove all other files.

        shards: the first shards, in order.
        rewritten: name of a shard -> SHA-256 of its content after `rewrite`, for shards that may have been rewritten.

        Raises `BadJournal` if a shard is missing or damaged.
        """
        names = {shard.name for shard in shards}
        for path in self.folder.iterdir():
            if path.is_dir():
                remove_folder(path)
            elif path.name not in names:
                path.unlink()
        for shard in shards:
            path = self.folder / shard.name
            try:
                actual = file_checksum(path)
                if actual not in (shard.sha256, rewritten.get(shard.name)):
                    raise ValueError(f"its SHA-256 is {actual} and {shard.sha256} was written")
            except (OSError, ValueError) as error:
                raise damaged(path, error) from error
            self._add(shard)
            self.checksums[shard.name] = actual

    def write_shard(self, tensors: Mapping[str, Tensor]) -> Shard:
        """Write the next shard, completely or not at all, and return its description. tensors: name -> tensor."""
        number = self._written + 1
        name = SINGLE if self._shards == 1 else f"model-{number:05d}-of-{self._shards:05d}.safetensors"
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._save(name, plain)
        shard = Shard(name, self.checksums[name], tuple(plain), sum(tensor.nbytes for tensor in plain.values()))
        self._add(shard)
        return shard

    def rewrite(self, tensors: Mapping[str, Tensor], on_checksum: Callable[[str, str], None]) -> None:
        """Replace the values of written tensors, cast to their stored types. Doing it twice is doing it once.

        tensors: name -> tensor.
        on_checksum: called with the name of a shard and the SHA-256 of its new content, before the shard is replaced.

        Raises `ValueError` if a shape differs from the written one.
        """
        for name in sorted({self._weight_map[key] for key in tensors}):
            stored = load_file(self.folder / name)
            for key in stored.keys() & tensors.keys():
                if stored[key].shape != tensors[key].shape:
                    raise ValueError(f"{key} was written as {stored[key].shape} and is {tensors[key].shape} now")
                stored[key] = tensors[key].detach().to("cpu", stored[key].dtype).contiguous()
            self._save(name, stored, on_checksum)

    def _add(self, shard: Shard) -> None:
        self._written += 1
        self._weight_map.update(dict.fromkeys(shard.tensors, shard.name))
        self.checksums[shard.name] = shard.sha256
        self._bytes += shard.bytes

    def _save(
        self, name: str, plain: dict[str, Tensor], on_checksum: Callable[[str, str], None] = lambda name, sha256: None
    ) -> None:
        def fill(incomplete: Path) -> None:
            try:
                save_file(plain, incomplete, metadata={"format": "pt"})
            except SafetensorError as error:
                # safetensors gives the operating system's error only as text. A full disk is the common one.
                if "No space left" in str(error):
                    raise OSError(errno.ENOSPC, "No space left on device") from error
                raise OutputError(f"{self.final}: a shard could not be written ({error})") from error
            self.checksums[name] = file_checksum(incomplete)
            # safetensors makes files private; these get the permissions of the folder.
            incomplete.chmod(self.folder.stat().st_mode & 0o666)
            on_checksum(name, self.checksums[name])

        write_by(self.folder / name, fill)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file into the folder."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write a text file into the folder."""
        (self.folder / name).write_text(content, encoding="utf-8")

    def finish_weights(self) -> None:
        """Write the index, if there are several shards. Raises `ValueError` unless all shards were written."""
        if self._written != self._shards:
            raise ValueError(f"{self._written} of {self._shards} shards were written")
        if self._shards > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
            self.write_json(INDEX, index)

    def commit(self) -> None:
        """Move the finished checkpoint to `final`, replacing the checkpoint there if `replace` allows it.

        Raises `OutputError` if that fails; `final` then stays as it was.
        """
        assert self._run is not None
        check_output(self.final, self._replace)
        self._run.commit()


def check_output(final: Path, replace: bool) -> None:
    """Raise `OutputError` if a checkpoint may not be written at `final`.

    replace: whether a subnibble checkpoint there may be replaced. Other content never is.
    """
    if any(has_begun(work) for work in work_folders(final)):
        # An earlier run was killed while it put its checkpoint there; the next run on this folder finishes that.
        return
    try:
        if final.exists() and not final.is_dir():
            kind = "a file" if final.is_file() else "no folder"
            raise OutputError(f"{final} is {kind}; give a folder that does not exist yet")
        if not final.is_dir() or not contents(final):
            return
    except OSError as error:
        raise OutputError(f"{final}: cannot be read ({error.strerror}); choose another folder") from error
    if not replace:
        raise OutputError(f"{final} is not empty; choose another folder, or pass --overwrite to replace it")
    if not is_packed(final):
        raise OutputError(
            f"{final} is not a subnibble checkpoint, so --overwrite leaves it alone; choose another folder"
        )


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a subnibble checkpoint."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
