"""Compare the speed of whole models: SmolLM2-135M in float32, packed to 2, 3 and 4 bits, and llama.cpp's Q4_0.

    python bench/model_speed.py [--threads N ...] [--rounds N]
    python bench/model_speed.py --print

A prompt of 512 tokens, then greedy decoding, through transformers, by the native step (16-bit inputs, and int8 ones)
and by llama.cpp, in turn in one process. Models are rounded to nearest, because a method does not change the operations
that run; Q4_0 is what llama-quantize makes of the package's Q4_1.
One thread is timed in CPU time, several in wall time. Finished rows are appended to the results file;
later runs skip them. `peers/build.py` builds llama.cpp.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from measure import HERE, environment, print_table
from peers.build import FOLDER, LLAMA
from peers.machine import processor
from rows import Rows

PROMPT, DECODED, ROUNDS = 512, 32, 5
THREADS = (1, 2)
BITS = (2, 3, 4)
Q4_0 = "llama.cpp Q4_0"
KEY = ("cpu", "instructions", "threads")
PARTS = ("prompt", "decode")
# Inputs of linears in the native step -> `--activations`.
NATIVE = {"native step, 16-bit inputs": None, "native step, int8 inputs": "int8"}
# Any tokens that are words.
TOKENS = list(range(1000, 1000 + PROMPT))

# Returns the seconds that a token of each part takes, in one round.
Timer = Callable[[], dict[str, float]]


def main() -> None:
    """Measure each number of threads that is missing in its own process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers", type=Path, default=FOLDER, metavar="DIR", help="where peers/build.py built")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "model_speed.json", help="results file")
    parser.add_argument("--print", action="store_true", help="print finished rows, measure none")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    table = Rows(arguments.results, KEY)
    if arguments.child:
        table.append(measured(arguments.threads[0], arguments.rounds, arguments.peers))
        return
    numbers = [] if arguments.print else arguments.threads
    for threads in numbers:
        if table.has({**processor(), "threads": threads}):
            continue
        command = [sys.executable, __file__, "--child", "--threads", str(threads), "--rounds", str(arguments.rounds)]
        command += ["--results", str(arguments.results), "--peers", str(arguments.peers)]
        bound = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"} if threads > 1 else {}
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads), **bound})
    show(Rows(arguments.results, KEY).rows)


def measured(threads: int, number: int, peers: Path) -> dict[str, Any]:
    """Time all models in turn and return the row."""
    import torch

    from peers.product import Missing

    torch.set_num_threads(threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        timers: dict[str, Timer] = {}
        sizes: dict[str, int] = {}
        missing = {}
        for name, path in models(folder):
            timers[name] = _transformers(path, threads)
            sizes[name] = _bytes(path)
            if name != "float32":
                for inputs, activations in NATIVE.items():
                    timers[f"{name}, {inputs}"] = _native(path, threads, activations)
                    sizes[f"{name}, {inputs}"] = sizes[name]
        try:
            file = requantized(folder, peers)
            timers[Q4_0], sizes[Q4_0] = _llama(file, threads, peers), _bytes(file)
        except Missing as error:
            missing[LLAMA.name] = str(error)
        speeds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in timers}
        for index in range(number):
            print(f"{threads} threads, round {index + 1} of {number}", file=sys.stderr, flush=True)
            for name, timer in timers.items():
                for part, seconds in timer().items():
                    speeds[name][part].append(round(1 / seconds, 3))
    facts = {**environment(), **processor(), "llama.cpp": f"{LLAMA.package} {LLAMA.version}", "missing": missing}
    return {**facts, "prompt": PROMPT, "decoded": DECODED, "bytes": sizes, "tokens_per_second": speeds}


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the models that run through transformers: name, path. The packed ones are written into `folder`."""
    from subnibble import Recipe, quantize
    from subnibble.packaged.model import find_model

    yield "float32", find_model()
    for bits in BITS:
        path = folder / f"w{bits}"
        quantize(find_model(), path, Recipe("rtn", bits, embedding_bits=8, options={"clip": "minmax"}))
        yield f"subnibble w{bits}", path


def requantized(folder: Path, peers: Path) -> Path:
    """Write the package's model as Q4_0 into `folder`."""
    from peers.llama_model import requantize
    from subnibble.packaged.model import find_model

    file = folder / "q4_0.gguf"
    requantize(find_model(), file, peers)
    return file


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".gguf"))


def _clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def _transformers(path: Path, threads: int) -> Timer:
    """Time generation: the prompt as the time to the first token, decoding as the time of the tokens after it."""
    import torch

    from subnibble.hf import load_model

    model, clock = load_model(path, "float32"), _clock(threads)

    def seconds(tokens: int) -> float:
        start = clock()
        model.generate(torch.tensor([TOKENS]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return clock() - start

    def run() -> dict[str, float]:
        first = seconds(1)
        return {"prompt": first / PROMPT, "decode": (seconds(1 + DECODED) - first) / DECODED}

    seconds(2)
    return run


def _native(path: Path, threads: int, activations: str | None) -> Timer:
    """Time the native step's reading of the prompt, and greedy decoding after it."""
    from subnibble.hf import load_model
    from subnibble.hf.decoder import Decoder
    from subnibble.hf.inputs import round_inputs_

    model, clock = load_model(path, "bfloat16"), _clock(threads)
    if activations is not None:
        round_inputs_(model, activations)
    decoder = Decoder(model)

    def run() -> dict[str, float]:
        sequence = decoder.open()
        start = clock()
        logits = decoder.forward([sequence], [TOKENS])
        middle = clock()
        for _ in range(DECODED):
            logits = decoder.forward([sequence], [[int(logits.argmax())]])
        return {"prompt": (middle - start) / PROMPT, "decode": (clock() - middle) / DECODED}

    run()
    return run


def _llama(file: Path, threads: int, peers: Path) -> Timer:
    """Time llama.cpp's reading of the prompt, and greedy decoding after it."""
    from peers.llama_model import LlamaModel

    model, clock = LlamaModel(file, 2 * PROMPT, threads, peers), _clock(threads)

    def run() -> dict[str, float]:
        start = clock()
        token = model.prompt(TOKENS)
        middle = clock()
        if model.decode(token, DECODED) < 0:
            raise RuntimeError("llama.cpp could not decode")
        return {"prompt": (middle - start) / PROMPT, "decode": (clock() - middle) / DECODED}

    run()
    return run


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each processor and number of threads."""
    columns = ("model", "file, MB", "prompt, t/s", "of float32's", "decode, t/s", "of float32's", "of Q4_0's")
    for row in rows:
        threads = row["threads"]
        print(f"**{threads} thread{'s' if threads > 1 else ''}**, {row['cpu']}, {row['instructions']}\n")
        print_table(columns, _lines(row))
        print()


def _lines(row: dict[str, Any]) -> Iterator[list[str]]:
    speeds = row["tokens_per_second"]

    def of(name: str, other: str, part: str) -> str:
        if other not in speeds:
            return ""
        pairs = zip(speeds[name][part], speeds[other][part], strict=True)
        return f"{median(ours / theirs for ours, theirs in pairs):.2f}"

    for name, parts in speeds.items():
        prompt, decode = max(parts["prompt"]), max(parts["decode"])
        yield [
            name, f"{row['bytes'][name] / 1e6:.1f}", f"{prompt:.0f}", of(name, "float32", "prompt"),
            f"{decode:.1f}", of(name, "float32", "decode"), of(name, Q4_0, "decode"),
        ]  # fmt: skip


if __name__ == "__main__":
    main()
