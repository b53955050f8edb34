"""How the C++ module is built and installed; a module of other sources is refused; sets that never ran are off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from kernel_samples import sample

from linears import built
from subnibble.errors import StaleKernels
from subnibble.kernels import built_from, verified
from subnibble.kernels import native as kernels
from subnibble.runtime.modules import PackedLinear
from subnibble.runtime.native import Choice
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src/subnibble/kernels")
SOURCES = ROOT / PACKAGE / "cpp"
needs_kernels = pytest.mark.skipif(not kernels.instruction_sets(), reason="the kernels were not built")


def module_file() -> Path:
    return Path(kernels.module.__file__)


def python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with this Python; path: folder of the package, if not the installed one."""
    where = {} if path is None else {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", env={**os.environ, **where, **environment}, check=False
    )


# Sources and their hash


@needs_kernels
def test_the_module_carries_the_hash_of_its_sources() -> None:
    assert built_from.hash_in(module_file()) == built_from.sources_hash(SOURCES)


@needs_kernels
@pytest.mark.parametrize("name", ["products.h", "bindings.cpp", "CMakeLists.txt", "module.cmake"])
@pytest.mark.parametrize("change", ["edit", "rename", "remove"])
def test_a_change_of_any_source_is_refused(name: str, change: str, tmp_path: Path) -> None:
    copy = shutil.copytree(SOURCES, tmp_path / "cpp")
    built_from.check(module_file(), copy)
    if change == "edit":
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    elif change == "rename":
        (copy / name).rename(copy / f"new{name}")
    else:
        (copy / name).unlink()
    with pytest.raises(StaleKernels, match=r"other C\+\+ sources.*pip install -v"):
        built_from.check(module_file(), copy)


@needs_kernels
def test_a_module_without_a_hash_is_refused_where_sources_are() -> None:
    import _ctypes

    with pytest.raises(StaleKernels):
        built_from.check(Path(_ctypes.__file__), SOURCES)


@needs_kernels
def test_an_installed_package_has_no_sources_and_no_check(tmp_path: Path) -> None:
    built_from.check(module_file(), tmp_path / "cpp")


# An editable install


def test_pythonpath_names_another_tree(tmp_path: Path) -> None:
    other = tmp_path / "subnibble"
    other.mkdir()
    (other / "__init__.py").write_text("")
    assert python("import subnibble; print(subnibble.__file__)", tmp_path).stdout == f"{other / '__init__.py'}\n"


# Instruction sets that have never run


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an instruction set that this processor has, faster than all others, which are verified."""
    others = kernels.instruction_sets()

    class Module:
        @staticmethod
        def instruction_sets() -> list[str]:
            return ["never-run", *others]

    monkeypatch.setattr(kernels, "module", Module)
    monkeypatch.setattr(verified, "names", lambda: frozenset(others))
    monkeypatch.setattr(kernels, "_chosen", kernels._Chosen())
    return "never-run"


@needs_kernels
def test_an_instruction_set_that_never_ran_is_off_until_it_is_named(unverified: str) -> None:
    assert kernels.instruction_sets()[0] == unverified
    assert kernels.isa() == kernels.instruction_sets()[1]
    linear = PackedLinear(built(PackedTensor((sample(Scheme(4, 32), 64),))))
    assert linear.kernel == Choice(kernels.isa(), f"{unverified} is not verified")
    with kernels.chosen(unverified):
        assert linear.kernel == Choice(unverified, "chosen")


def test_without_a_verified_instruction_set_torch_runs(unverified: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "names", frozenset)
    assert kernels._Chosen().isa == kernels.TORCH


def test_every_row_of_the_table_says_what_ran_where() -> None:
    rows = tomllib.loads(verified.TABLE.read_text())["verified"]
    assert [set(row) for row in rows] == [{"instruction_set", "processor", "commit"}] * len(rows)
    assert len({row["instruction_set"] for row in rows}) == len(rows)
    assert "portable" in verified.names()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_the_program_without_python_finds_all_instruction_sets_right(tmp_path: Path) -> None:
    options = ("-DSUBNIBBLE_MODULE=OFF", "-DSUBNIBBLE_CHECK=ON", "-DCMAKE_BUILD_TYPE=Debug")
    subprocess.run(["cmake", "-S", SOURCES, "-B", tmp_path, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    done = subprocess.run([tmp_path / "kernels_check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(kernels.instruction_sets())


# Installs, each in a copy of the tree


def tree(folder: Path) -> Path:
    """Copy what a build needs."""
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
    return folder


def pip(*arguments: object, **environment: str) -> str:
    """Run this Python's pip without dependencies, which are here, and without optimization, which takes longest."""
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "-C", "cmake.build-type=Debug"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no compiler", "an error in a source"])
def test_without_a_working_compiler_the_package_runs_on_torch_and_says_so_once(fault: str, tmp_path: Path) -> None:
    copy, out = tree(tmp_path), tmp_path / "out"
    if fault == "no compiler":
        printed = pip("install", "-v", "--target", out, copy, CXX="/bin/false")
        assert "/bin/false" in printed
    else:
        for source in (copy / PACKAGE / "cpp").glob("*.cpp"):
            source.write_text("#error planted\n")
        printed = pip("install", "-v", "--target", out, copy)
        assert "#error planted" in printed
    assert not list((out / "subnibble").rglob("*.so"))
    code = f"""
import sys, torch; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from kernel_samples import sample, tokens
from linears import built
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme
import subnibble; print(subnibble.__file__)
weight, x = PackedTensor((sample(Scheme(4, 32), 64),)), tokens(3, 64)
linear = PackedLinear(built(weight))
torch.testing.assert_close(linear(x), linear(x)); torch.testing.assert_close(linear(x), x @ weight.dequantize().T)
"""
    done = python(code, out)
    assert (done.returncode, done.stdout) == (0, f"{out / 'subnibble' / '__init__.py'}\n"), done.stderr
    assert done.stderr.count("the kernels were not built") == 1
    assert "pip install -v" in done.stderr


@pytest.mark.slow
def test_a_wheel_holds_the_module_and_no_sources(tmp_path: Path) -> None:
    copy = tree(tmp_path)
    pip("wheel", "--wheel-dir", tmp_path, copy)
    (file,) = tmp_path.glob("*.whl")
    with ZipFile(file) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "out")
    files = {
        str(Path("subnibble") / path.relative_to(copy / "src" / "subnibble"))
        for path in (copy / "src" / "subnibble").rglob("*")
        if path.is_file() and "cpp" not in path.parts
    }
    (module,) = {name for name in names if name.endswith(".so")}
    assert {name for name in names if name.startswith("subnibble/")} == files | {module}
    assert {"subnibble/kernels/_native.pyi", "subnibble/kernels/verified.toml"} <= files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    code = "from subnibble.kernels import native; print(native.isa())"
    assert python(code, tmp_path / "out").stdout == f"{kernels.default()}\n"


@pytest.mark.slow
def test_a_source_distribution_holds_the_sources_and_nothing_built(tmp_path: Path) -> None:
    copy = tree(tmp_path)
    (copy / PACKAGE / "_native.cpython-311-x86_64-linux-gnu.so").write_bytes(b"built")
    tool = tmp_path / "tool"
    pip("install", "--target", tool, "scikit-build-core")
    code = f"import os, sys\nos.chdir({str(copy)!r})\nfrom scikit_build_core.build import build_sdist\nbuild_sdist('.')"
    done = python(code, tool)
    assert done.returncode == 0, done.stderr
    (file,) = copy.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = (path.relative_to(SOURCES) for path in SOURCES.rglob("*") if path.is_file())
    sources = {str(PACKAGE / "cpp" / path) for path in files}
    assert sources | {"LICENSE", "README.md", "pyproject.toml", "src/subnibble/version.py"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
@needs_kernels
def test_environments_share_one_module_that_is_replaced_as_a_whole(tmp_path: Path) -> None:
    copy = tree(tmp_path)

    def install(environment: str) -> str:
        return pip("install", "-v", "--upgrade", "--target", tmp_path / environment, "--editable", copy)

    assert "is new" in install("first")
    (module,) = (copy / PACKAGE).glob("_native.*.so")
    before = module.stat()
    assert "is up to date" in install("second")
    assert (module.stat().st_ino, module.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from kernel_samples import multiplied, sample, tokens, torch, native, Scheme
part, x = sample(Scheme(4, 32), 64), tokens(3, 64)
before = multiplied(part, x)
print(native.native.module.__file__, flush=True)
input()
assert torch.equal(before, multiplied(part, x))
print("goes on")
"""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == f"{module}\n"
        source = copy / PACKAGE / "cpp" / "bindings.cpp"
        source.write_text(source.read_text() + "// another comment\n")
        stale = python("import subnibble.kernels.native", copy / "src")
        assert stale.returncode != 0
        assert "StaleKernels" in stale.stderr
        assert "is new" in install("second")
        assert module.stat().st_ino != before.st_ino
        assert list((copy / PACKAGE).glob("_native.*.so")) == [module]
        assert running.communicate("\n")[0] == "goes on\n"
    assert running.returncode == 0
    assert python("import subnibble.kernels.native", copy / "src").returncode == 0
