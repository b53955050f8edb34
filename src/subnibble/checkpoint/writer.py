"""Write a checkpoint folder shard by shard; it appears under its final name only when it is complete.

Until then its files are in a hidden folder. If the final folder exists, the hidden one is inside it, since the final
folder may be a mounted volume or have a read-only parent; else it is beside it. So no rename crosses disks.
"""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subnibble.checkpoint.checksums import file_checksum
from subnibble.checkpoint.manifest import QUANT_METHOD
from subnibble.checkpoint.weight_files import INDEX, SINGLE
from subnibble.errors import NotLoadable, OutputError

_CONFIG = "config.json"
# Part of the name of a hidden folder. A writer that is killed leaves its hidden folder behind.
_PARTIAL = ".partial-"
# The folder that the root of an empty volume holds.
_OF_VOLUMES = "lost+found"


class CheckpointWriter:
    """A context manager that collects shards in a hidden folder inside or beside `final`, until `commit`.

    Leaving the `with` block without `commit` removes the hidden folder. Exception: after an error that follows the last
    weight, the folder is kept, since its weights may have taken hours, and a note on the error says where it is.

    final: the folder to write.
    shards: number of shards that will be written.
    replace: whether `commit` may replace an existing checkpoint at `final`.
    folder: the hidden folder.
    checksums: file name -> SHA-256 of each weight file written so far.
    """

    def __init__(self, final: Path, shards: int, replace: bool) -> None:
        self.final = final.resolve()
        # The random part avoids the hidden folder of an earlier run that was killed.
        self.folder = self.final.with_name(f".{self.final.name}{_PARTIAL}{secrets.token_hex(4)}")
        self._shards, self._written = shards, 0
        self._weight_map: dict[str, str] = {}
        self.checksums: dict[str, str] = {}
        self._bytes = 0
        self._replace = replace
        self._whole = False

    def __enter__(self) -> Self:
        check_output(self.final, self._replace)
        try:
            if self.final.is_dir():
                self.folder = self.final / self.folder.name
            self.final.parent.mkdir(parents=True, exist_ok=True)
            # mkdir without a mode, so that the user's umask decides permissions.
            self.folder.mkdir()
        except OSError as error:
            raise OutputError(f"{self.final}: cannot be created ({error.strerror}); choose another folder") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A checkpoint that does not load is not worth keeping.
        is_kept = error is not None and self._whole and not isinstance(error, NotLoadable)
        if not is_kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            state = f"the checkpoint is kept in {self.folder}" if is_kept else "nothing was kept"
            raise OutputError(f"{self.final}: {error.strerror}; {state}. Free space or choose another disk") from error
        if is_kept and error is not None:
            error.add_note(f"The written checkpoint is kept in {self.folder}; move it where you want it.")

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard, completely or not at all. tensors: name -> tensor."""
        self._written += 1
        name = SINGLE if self._shards == 1 else f"model-{self._written:05d}-of-{self._shards:05d}.safetensors"
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._save(name, plain)
        self._weight_map.update(dict.fromkeys(plain, name))
        self._bytes += sum(tensor.nbytes for tensor in plain.values())

    def rewrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the values of written tensors, cast to their stored types.

        tensors: name -> tensor. Raises `ValueError` if a shape differs from the written one.
        """
        # If this fails halfway, shards with old and new values are no checkpoint to keep.
        self._whole = False
        for name in sorted({self._weight_map[key] for key in tensors}):
            stored = load_file(self.folder / name)
            for key in stored.keys() & tensors.keys():
                if stored[key].shape != tensors[key].shape:
                    raise ValueError(f"{key} was written as {stored[key].shape} and is {tensors[key].shape} now")
                stored[key] = tensors[key].detach().to("cpu", stored[key].dtype).contiguous()
            self._save(name, stored)

    def _save(self, name: str, plain: dict[str, Tensor]) -> None:
        incomplete = self.folder / f"{name}.part"
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
        incomplete.replace(self.folder / name)

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
        self._whole = True

    def commit(self) -> None:
        """Move the finished checkpoint to `final`, replacing the checkpoint there if `replace` allows it.

        Raises `OutputError` if that fails; `final` then stays as it was.
        """
        self._whole = True
        check_output(self.final, self._replace)
        try:
            if self.final.is_dir():
                self._move_in()
            else:
                self.folder.rename(self.final)
        except OSError as error:
            raise OutputError(f"{self.final}: the finished checkpoint cannot go there ({error.strerror})") from error
        self._whole = False

    def _move_in(self) -> None:
        """Replace the final folder's files by the new ones, or leave all files in place if anything fails."""
        old = self.final / f"{self.folder.name}-old"
        old.mkdir()
        moves: list[tuple[Path, Path]] = []
        # config.json leaves first and arrives last: without it a folder is no model, so nobody loads a mixture.
        leaving = sorted(contents(self.final), key=lambda entry: entry.name != _CONFIG)
        coming = sorted(self.folder.iterdir(), key=lambda entry: entry.name == _CONFIG)
        try:
            for entry, place in [*((entry, old) for entry in leaving), *((entry, self.final) for entry in coming)]:
                if (place / entry.name).exists():
                    raise FileExistsError(errno.EEXIST, f"another program created {entry.name} in the meantime")
                moves.append((entry, place / entry.name))
                entry.rename(place / entry.name)
        except BaseException:
            # BaseException includes KeyboardInterrupt.
            for origin, place in reversed(moves):
                if place.exists() and not origin.exists():
                    place.rename(origin)
            old.rmdir()
            raise
        shutil.rmtree(old, ignore_errors=True)


def contents(folder: Path) -> list[Path]:
    """List a folder without the hidden folders of unfinished writers and without lost+found."""
    return [
        entry
        for entry in folder.iterdir()
        if entry.name != _OF_VOLUMES and not (entry.name.startswith(".") and _PARTIAL in entry.name)
    ]


def check_output(final: Path, replace: bool) -> None:
    """Raise `OutputError` if a checkpoint may not be written at `final`.

    replace: whether a subnibble checkpoint there may be replaced. Other content never is.
    """
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
