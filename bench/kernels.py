"""Time products of packed linears against other programs' and against this machine's limits, in one process.

    python bench/kernels.py [--shape NxK ...] [--tokens N ...] [--threads N ...] [--inputs BITS ...]
    python bench/kernels.py --print

Every round runs all methods in turn, so that other load slows all of them; figures are those of the fastest round,
ratios the median of rounds. One thread is timed in CPU time, several in wall time, on a pool whose threads are bound to
one processor each and have just run. Up to 16 tokens a method's weights are so many copies that none is in the cache;
above, it is one copy. All methods get tokens in the type that they take and are checked first (peers/checking.py): a
wrong product ends the process, and nothing is printed.

Peers are optional: --missing says what is not installed and how to get it. A row is of one shape, number of tokens,
number of threads and processor; finished rows are appended to the results file, and later runs skip them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from measure import HERE, environment, print_table
from peers.machine import processor
from rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from peers.product import Method, Weight

# Outputs x inputs.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 1536), (1536, 576))
TOKENS = (1, 4, 16, 128, 512)
THREADS = (1, 2)
ROUNDS = 7
# Bits of our kernels' inputs: 24 for float32, 16 for bfloat16, 8.
INPUTS = (24, 16, 8)
# Up to so many tokens weights come from memory; their copies have at least so many bytes together.
COLD_TOKENS, COLD_BYTES, MOST_COPIES = 16, 2**28, 512
KEY = ("cpu", "instructions", "shape", "tokens", "threads")


def main() -> None:
    """Measure the rows that are missing, each shape and number of threads in its own process, and print the tables."""
    arguments = _arguments()
    table = Rows(arguments.results, KEY)
    if arguments.missing:
        for peer, reason in found(arguments)[1].items():
            print(f"{peer}: {reason}")
        return
    if arguments.child:
        for row in measured(arguments, arguments.shape[0], arguments.threads[0], arguments.tokens):
            table.append(row)
        return
    if not arguments.print:
        for threads in arguments.threads:
            for shape in arguments.shape:
                key = {**processor(), "shape": _written(shape), "threads": threads}
                if tokens := [one for one in arguments.tokens if not table.has({**key, "tokens": one})]:
                    _run(arguments, shape, threads, tokens)
    show(Rows(arguments.results, KEY).rows)


def _arguments() -> argparse.Namespace:
    from peers.build import FOLDER

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_shape, nargs="+", default=SHAPES, metavar="NxK", help="outputs x inputs")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, metavar="N")
    names = "only methods whose names hold a text: the row counts as finished, so give --results, too"
    parser.add_argument("--method", nargs="+", default=[], metavar="TEXT", help=names)
    parser.add_argument("--inputs", type=int, nargs="+", default=INPUTS, metavar="BITS", help="bits of our inputs")
    parser.add_argument("--isa", nargs="+", default=[], help="time our kernels of these instruction sets, too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers", type=Path, default=FOLDER, metavar="DIR", help="where peers/build.py built")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "kernels.json", help="results file")
    parser.add_argument("--print", action="store_true", help="print finished rows, measure none")
    parser.add_argument("--missing", action="store_true", help="list peers that cannot be used here, and why")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: give OUTPUTSxINPUTS, for example 4096x4096")
    return int(rows), int(columns)


def _written(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _run(arguments: argparse.Namespace, shape: tuple[int, int], threads: int, tokens: list[int]) -> None:
    """Measure rows in a process whose threads are bound from its start."""
    command = [sys.executable, __file__, "--child", "--shape", _written(shape), "--threads", str(threads), "--tokens"]
    command += [*map(str, tokens), "--rounds", str(arguments.rounds)]
    command += ["--results", str(arguments.results), "--peers", str(arguments.peers)]
    for option, values in (("--method", arguments.method), ("--isa", arguments.isa), ("--inputs", arguments.inputs)):
        command += [option, *map(str, values)] if values else []
    bound = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"} if threads > 1 else {}
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads), **bound})


def found(arguments: argparse.Namespace) -> tuple[list[Method], dict[str, str]]:
    """Return the methods that can be timed here, and the peers that are missing: name -> reason."""
    from peers import auto_round, ggml, onnxruntime_ops, ours, torch_ops
    from peers.build import IK, IK_PRODUCTS, LLAMA, LLAMA_PRODUCTS
    from peers.product import Missing

    adapters: dict[str, Callable[[], list[Method]]] = {
        "torch": torch_ops.methods,
        **{
            f"subnibble a{bits} {isa or ''}": lambda bits=bits, isa=isa: ours.methods(bits, isa)
            for bits in arguments.inputs
            for isa in (None, *arguments.isa)
        },
        "onnxruntime": onnxruntime_ops.methods,
        "auto-round": auto_round.methods,
        LLAMA.name: lambda: ggml.methods(LLAMA_PRODUCTS, arguments.peers),
        IK.name: lambda: ggml.methods(IK_PRODUCTS, arguments.peers),
    }
    methods, missing = [], {}
    for name, adapter in adapters.items():
        try:
            methods += adapter()
        except Missing as error:
            missing[name] = str(error)
    texts = arguments.method
    return [one for one in methods if not texts or any(text in one.name for text in texts)], missing


def measured(
    arguments: argparse.Namespace, shape: tuple[int, int], threads: int, numbers: list[int]
) -> Iterator[dict[str, Any]]:
    """Check and time all methods on one shape; yield a row for each number of tokens."""
    import torch

    from peers.peaks import peaks

    torch.set_num_threads(threads)
    methods, missing = found(arguments)
    torch.manual_seed(0)
    weights, refused = made(methods, torch.randn(shape))
    limits = peaks()
    facts = {**environment(), **processor(), "packages": packages(), "missing": missing | refused}
    for tokens in numbers:
        print(f"{_written(shape)}, {tokens} tokens, {threads} threads", file=sys.stderr, flush=True)
        x = torch.randn(tokens, shape[1])
        calls = {}
        for method in methods:
            if method.name in weights:
                weight = weights[method.name]
                copies = weight.copies if tokens <= COLD_TOKENS else 1
                calls[method.name] = (checked(method.name, weight, x, copies), copies)
        timed = rounds({**calls, **{name: (run, 1) for name, (run, _) in limits.items()}}, arguments.rounds, threads)
        yield {
            "shape": _written(shape),
            "tokens": tokens,
            **facts,
            "limits": {name: amount / min(timed[name]) * 1e6 for name, (_, amount) in limits.items()},
            "bits": {
                method.name: [method.bits, weights[method.name].bits] for method in methods if method.name in calls
            },
            "microseconds": {name: [round(one, 2) for one in timed[name]] for name in calls},
        }


def made(methods: list[Method], dense: Tensor) -> tuple[dict[str, Weight], dict[str, str]]:
    """Make each method's copies of a weight; also return what methods refused it: name -> reason."""
    from peers.product import Missing

    def copies(bits: float) -> int:
        return min(MOST_COPIES, max(2, round(-(-8 * COLD_BYTES // (bits * dense.numel())))))

    weights, refused = {}, {}
    for method in methods:
        try:
            weights[method.name] = method.make(dense, copies)
        except Missing as error:
            refused[method.name] = str(error)
    return weights, refused


def checked(name: str, weight: Weight, x: Tensor, copies: int) -> Callable[[], Tensor]:
    """Return the function that runs the products of x; end the process if a product is wrong."""
    import torch

    from peers.checking import wrong

    with torch.inference_mode():
        run = weight.bind(x, copies)
        if reason := wrong(weight.inputs(x), weight.dense, run(), weight.tolerance):
            sys.exit(f"{name}: a product with {len(x)} tokens is wrong: {reason}; nothing is timed")
    return run


def rounds(calls: dict[str, tuple[Callable[[], object], int]], number: int, threads: int) -> dict[str, list[float]]:
    """Time methods in turn.

    calls: name -> (function, number of products that one run of it is).

    Returns microseconds of a product in each round. A run that is not timed warms a method's code and threads.
    """
    import time

    import torch

    clock = time.process_time if threads == 1 else time.perf_counter
    figures: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(number):
            for name, (run, products) in calls.items():
                run()
                start = clock()
                run()
                figures[name].append(1e6 * (clock() - start) / products)
    return figures


def packages() -> dict[str, str]:
    """Releases of peers that are installed or built."""
    from importlib import metadata

    from peers.build import IK, LLAMA

    releases = {source.name: f"{source.package} {source.version}" for source in (LLAMA, IK)}
    for name in ("onnxruntime", "auto-round-lib"):
        try:
            releases[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return releases


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each processor, number of threads and shape."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cpu"], row["instructions"], row["threads"], row["shape"]), {})[row["tokens"]] = row
    for (cpu, instructions, threads, shape), by_tokens in groups.items():
        print(f"**{shape}, {threads} thread{'s' if threads > 1 else ''}**: {cpu}, {instructions}.")
        one = [by_tokens[tokens] for tokens in sorted(by_tokens)]
        limits = (f"{name.replace(',', '')} {max(row['limits'][name] for row in one):.4g}" for name in one[0]["limits"])
        print(f"Limits: {'; '.join(limits)}. Commit {one[0]['commit']}.\n")
        heads = (f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}" for row in one)
        print_table(("method", "bits", *heads, "of reading", "of int8"), _lines(one))
        print()


def _lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Cells of each method, fewest bits first. rows: of one shape, by the number of tokens."""
    bits: dict[str, list[float]] = {}
    for row in rows:
        bits |= row["bits"]
    for name in sorted(bits, key=lambda one: (bits[one][0], not _is_ours(one))):
        shares = share(rows[0], name, False), share(rows[-1], name, True)
        yield [name, f"{bits[name][1]:.3g}", *(_cell(row, name) for row in rows), *shares]


def _cell(row: dict[str, Any], name: str) -> str:
    """Microseconds of the fastest round; in brackets how many times as fast ours is as the best peer of its bits."""
    if name not in row["microseconds"]:
        return ""
    cell, times = f"{min(row['microseconds'][name]):.0f}", of_best_peer(row, name) if _is_ours(name) else ""
    return f"{cell} ({times})" if times else cell


def of_best_peer(row: dict[str, Any], name: str) -> str:
    """How many times as fast a method is as the best peer of its nominal bits; empty without one."""
    times, bits = row["microseconds"], row["bits"]
    peers = [one for one in times if not _is_ours(one) and bits[one][0] == bits[name][0]]
    return f"{min(ratio(row, name, peer) for peer in peers):.2f}" if peers else ""


def share(row: dict[str, Any], name: str, of_products: bool) -> str:
    """Share of what the machine can do: bytes of the weight over reading memory, or operations over int8 products."""
    rows, columns = _shape(row["shape"])
    read = row["bits"].get(name, [0, 0])[1] * rows * columns / 8
    amount, limit = (2 * row["tokens"] * rows * columns, "int8, GOP/s") if of_products else (read, "read, GB/s")
    times = row["microseconds"].get(name)
    return "" if times is None else f"{100 * amount / min(times) / 1e3 / row['limits'][limit]:.0f} %"


def _is_ours(name: str) -> bool:
    return name.startswith("subnibble")


def ratio(row: dict[str, Any], name: str, other: str) -> float:
    """How many times as fast as another method one is: the median of rounds."""
    pairs = zip(row["microseconds"][other], row["microseconds"][name], strict=True)
    return median(theirs / ours for theirs, ours in pairs)


if __name__ == "__main__":
    main()
