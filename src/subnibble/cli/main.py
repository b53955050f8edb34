"""The `subnibble` command. Parses, calls the Python API, prints; torch and transformers are imported in commands only.

Exit codes: 0, 2 for what the user can mend, 1 for a fault of subnibble's own (or a pipe that was closed), 130 on
Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated

import typer

from subnibble.cli import checkpoints, compare, demo, evaluate, quantize
from subnibble.cli.streams import prepare, say, tell
from subnibble.errors import SubnibbleError
from subnibble.version import __version__

# Failures of a disk, a pipe or a terminal, which nobody here can mend.
_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)

app = typer.Typer(
    name="subnibble",
    help="Quantize language models to 2, 3 and 4 bits, measure what was lost, run the packed result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("quantize")(quantize.quantize)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("generate")(evaluate.generate)
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
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; goes anywhere on the line.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    skip_checksums: Annotated[
        bool,
        typer.Option("--skip-checksums", help="Load packed files without comparing their SHA-256; goes anywhere, too."),
    ] = False,
) -> None:
    """Options of the command as a whole."""
    if skip_checksums:
        from subnibble.checkpoint.checksums import unverified

        context.with_resource(unverified())


def run() -> None:
    """Entry point of the installed command: as `main`, without other libraries' warnings.

    They are about our calls, and our tests make errors of them. `-W` and PYTHONWARNINGS show them.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    main()


def main() -> None:
    """Run the command with this process's arguments."""
    prepare()
    given = sys.argv[1:]
    debug = "--debug" in given
    # Options of the command as a whole may stand anywhere, and come first where they are parsed.
    first = [argument for argument in ("--skip-checksums",) if argument in given]
    arguments = [*first, *(argument for argument in given if argument not in ("--debug", "--skip-checksums"))]
    # transformers and huggingface_hub draw bars and advice of their own between ours.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A stop from outside unwinds like Ctrl-C, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app(args=arguments)
    except SubnibbleError as error:
        _show_trace(debug)
        _tell_of(error, f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as stop:
        _tell_of(stop)
        sys.exit(130)
    except SystemExit as stop:
        _tell_of(stop)
        raise
    except Exception as error:
        _show_trace(debug)
        if isinstance(error, OSError) and error.errno in _OUTSIDE:
            _tell_of(error, f"error: {error}")
            sys.exit(2)
        _tell_of(error, f"internal error: {type(error).__name__}: {error}")
        tell("This is a fault of subnibble; please report it with the output of the same command and --debug.")
        sys.exit(1)


def _tell_of(error: BaseException, *lines: str) -> None:
    """Tell of an error, and what was noted on it or on what led to it: where a checkpoint was kept."""
    for line in lines:
        tell(line)
    found: BaseException | None = error
    while found is not None:
        for note in getattr(found, "__notes__", ()):
            tell(note)
        found = found.__cause__ or found.__context__


def _show_trace(target: bool) -> None:
    if target:
        traceback.print_exc()
