"""The `subnibble` command: parses arguments, calls the Python API, prints. Only commands import torch and transformers.

Exit codes: 0 for success, 2 for errors that the user can fix, 1 for a bug in subnibble (or a closed pipe), 130 for
Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer

from subnibble.cli import checkpoints, compare, convert, demo, evaluate, generate, quantize
from subnibble.cli.streams import prepare, say, tell
from subnibble.errors import SubnibbleError
from subnibble.version import __version__

# Failures of a disk, a pipe or a terminal, which are no bugs of ours.
_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)

app = typer.Typer(
    name="subnibble",
    help="Quantize language models to 2, 3 and 4 bits, measure the loss of quality, and run the packed result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("quantize")(quantize.quantize)
app.command("convert")(convert.convert)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.command("prefix")(checkpoints.prefix)
app.command("distill")(checkpoints.distill)
app.command("inspect")(checkpoints.inspect)
app.command("estimate")(quantize.estimate)
app.command("list")(checkpoints.list_)
app.command("demo")(demo.demo)


def _version(target: bool) -> None:
    if target:
        say(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; allowed anywhere on the command line.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    skip_checksums: Annotated[
        bool,
        typer.Option(
            "--skip-checksums",
            help="Do not check the SHA-256 of packed files when they are loaded; allowed anywhere, too.",
        ),
    ] = False,
) -> None:
    """Options of all commands."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        from subnibble.resume.places import runs_in

        context.with_resource(runs_in(Path(cache) / "subnibble" / "runs"))
    if isa := os.environ.get("SUBNIBBLE_ISA"):
        from subnibble.kernels.native import chosen

        context.with_resource(chosen(isa))
    if skip_checksums:
        from subnibble.checkpoint.checksums import unverified

        context.with_resource(unverified())


def run() -> None:
    """Entry point of the installed command: runs `main` without warnings of other libraries.

    Such warnings concern our calls, not the user, and are errors in our tests. `-W` and PYTHONWARNINGS show them.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    main()


def main() -> None:
    """Run the command with this process's arguments."""
    prepare()
    line = sys.argv[1:]
    debug = "--debug" in line
    # Options of all commands are allowed anywhere on the line, but typer expects them before the command.
    first = [argument for argument in ("--skip-checksums",) if argument in line]
    arguments = [*first, *(argument for argument in line if argument not in ("--debug", "--skip-checksums"))]
    # transformers and huggingface_hub would print progress bars and advice between our lines.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # SIGTERM unwinds the stack like Ctrl-C. Long commands replace both handlers (`stops_at_safe_points`).
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app(args=arguments)
    except SubnibbleError as error:
        _show_trace(debug)
        _print_error(error, f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as stop:
        _print_error(stop)
        sys.exit(130)
    except SystemExit as stop:
        _print_error(stop)
        raise
    except Exception as error:
        _show_trace(debug)
        if isinstance(error, OSError) and error.errno in _OUTSIDE:
            _print_error(error, f"error: {error}")
            sys.exit(2)
        _print_error(error, f"internal error: {type(error).__name__}: {error}")
        tell("This is a bug in subnibble; please report it with the output of the same command with --debug.")
        sys.exit(1)


def _print_error(error: BaseException, *lines: str) -> None:
    """Print lines about an error, and the notes of the error and of its causes, such as where a checkpoint was kept."""
    for line in lines:
        tell(line)
    cause: BaseException | None = error
    while cause is not None:
        for note in getattr(cause, "__notes__", ()):
            tell(note)
        cause = cause.__cause__ or cause.__context__


def _show_trace(target: bool) -> None:
    if target:
        traceback.print_exc()
