"""Run the tests of the kernels on this processor, and print the rows that src/subnibble/kernels/verified.toml may get.

    python bench/verify_kernels.py

An instruction set without a row in that table is never chosen by default. Tests run every one that this processor has.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Not test_build.py, which builds the module anew.
TESTS = ("tests/kernels", "--ignore=tests/kernels/test_build.py", "--all")


def main() -> None:
    """Print a row for each instruction set, or the failures of the tests."""
    from subnibble.kernels import native

    if native.module is None:
        sys.exit(f"{native.why_missing()}: nothing to verify")
    if subprocess.run([sys.executable, "-m", "pytest", *TESTS], cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        sys.exit("the tests failed: no instruction set is verified")
    for name in native.instruction_sets():
        print(row(name, processor(), commit()))


def row(instruction_set: str, processor: str, commit: str) -> str:
    """A row of the table, as TOML."""
    return f'\n[[verified]]\ninstruction_set = "{instruction_set}"\nprocessor = "{processor}"\ncommit = "{commit}"'


def processor() -> str:
    """Name of this processor, on Linux with family and model, by which its instruction sets can be looked up."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor() or platform.machine()
    facts = dict(line.split("\t", 1) for line in file.read_text().split("\n\n")[0].splitlines() if "\t" in line)
    named = {name: value.strip("\t: ") for name, value in facts.items()}
    if "model name" not in named:
        return platform.machine()
    return f"{named['model name']}, family {named['cpu family']}, model {named['model']}"


def commit() -> str:
    """Abbreviated hash of the commit; ends with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
