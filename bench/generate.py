"""Compare whole programs that generate text: ours, llama.cpp, ik_llama.cpp and transformers in float32.

    python bench/generate.py [--model NAME ...] [--context N ...] [--threads N ...] [--models DIR]
    python bench/generate.py --print | --missing

Of each program, in a process of its own: time to load with warm files, time to the first token, tokens per second of a
prompt and of greedy decoding, peak memory over that after the imports, and the bytes of weights that a token reads. All
programs of a table take turns in every round. Before, each one must predict the text after the prompt: ours as torch
does without kernels, the others about as well as float32.
One thread is timed in CPU time, several in wall time. Finished rows are appended to the results file; later runs skip
them. `peers/build.py` builds the peers, and `second_model.py` assembles the larger model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import generate_tables
import second_model
from generate_arms import (
    MODELS,
    OURS,
    SHORT,
    TRANSFORMERS,
    Arm,
    Model,
    arms,
    bytes_read,
    file_bytes,
    original,
    prepared,
)
from generate_worker import CHECKED, Job
from measure import HERE, environment
from peers.build import FOLDER, IK, LLAMA
from peers.machine import processor
from peers.product import Missing
from rows import Rows

CONTEXTS, THREADS, ROUNDS = (512, 8192), (1, 2), 4
# Tokens that a round decodes. After a long prompt, all rounds continue one text.
DECODED = 16
KEY = ("cpu", "instructions", "model", "context", "threads", "arm")
WORKER = HERE / "generate_worker.py"
# How much worse than float32 a peer may predict, by its bits, in nats; ours is compared with its own weights.
WORSE = {32: 0.01, 4: 0.5, 3: 1.0, 2: 3.0}
# How far ours may be from its weights in torch, in nats, and as a share of the loss where inputs or KV are rounded.
NEAR, NEAR_ROUNDED = 0.1, 0.1


def main() -> None:
    """Measure the tables that lack rows, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--model", nargs="+", default=names, choices=names)
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS, metavar="N", help="tokens")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, metavar="N")
    parser.add_argument("--arm", nargs="+", default=[""], metavar="TEXT", help="measure arms with this in their name")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    default = second_model.FOLDER
    parser.add_argument("--models", type=Path, default=default, metavar="DIR", help="models, made on the first run")
    parser.add_argument("--peers", type=Path, default=FOLDER, metavar="DIR", help="where peers/build.py built")
    wikitext = HERE.parent.parent / "shared" / "data" / "wikitext-2"
    parser.add_argument("--wikitext", type=Path, default=wikitext, metavar="DIR", help="has test.raw.txt")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "generate.json", help="results file")
    parser.add_argument("--print", action="store_true", help="print finished rows, measure none")
    parser.add_argument("--missing", action="store_true", help="name what cannot be measured, and why")
    arguments = parser.parse_args()
    if arguments.missing:
        for name, reason in missing(arguments):
            print(f"{name}: {reason}")
        return
    table = Rows(arguments.results, KEY)
    for model in () if arguments.print else (model for model in MODELS if model.name in arguments.model):
        for context in arguments.context:
            for threads in arguments.threads:
                measure(table, model, context, threads, arguments)
    generate_tables.show(table.rows)


def missing(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(model and arm, why it cannot run)."""
    for model in MODELS:
        for arm in dict.fromkeys(arm for context in CONTEXTS for arm in arms(model, context)):
            try:
                original(model, arguments.models)
                if arm.program not in (OURS, TRANSFORMERS):
                    prepared(model, arm, arguments.models, arguments.peers)
            except Missing as error:
                yield f"{model.name}, {arm.name}", str(error)


def measure(table: Rows, model: Model, context: int, threads: int, arguments: argparse.Namespace) -> None:
    """Measure the arms of one table that have no row, in turn, and append their rows."""
    place = {**processor(), "model": model.name, "context": context, "threads": threads}
    chosen = [arm for arm in arms(model, context) if any(text in arm.name for text in arguments.arm)]
    absent = [arm for arm in chosen if not table.has({**place, "arm": arm.name})]
    if not absent:
        return
    with ExitStack() as stack:
        running = list(_checked(absent, model, context, threads, arguments, stack))
        for index in range(arguments.rounds):
            for worker in running:
                _say(f"{model.name}, {context} tokens, {threads} threads, round {index + 1}: {worker.arm.name}")
                worker.round()
    facts = {**place, **environment(), "threads": threads, "decoded": DECODED, "run": int(time.time())}
    facts |= {source.name: f"{source.package} {source.version}" for source in (LLAMA, IK)}
    for worker in running:
        table.append({**facts, **worker.row})


def _checked(
    absent: Iterable[Arm], model: Model, context: int, threads: int, arguments: argparse.Namespace, stack: ExitStack
) -> Iterator[Worker]:
    """Start the programs that are there, one after the other, and check what they predict."""
    text = tokens_of(model, arguments, context + DECODED * arguments.rounds + CHECKED)
    for arm in absent:
        _say(f"{model.name}, {context} tokens, {threads} threads: {arm.name} begins")
        try:
            path = prepared(model, arm, arguments.models, arguments.peers)
            job = job_of(arm, path, threads, text, arguments.peers)
            bound = expected(model, arm, path, text, arguments)
            worker = stack.enter_context(Worker(arm, job, min(context, len(text))))
            worker.begin(path, bound)
        except Missing as error:
            print(f"{arm.name} is left out: {error}", file=sys.stderr)
            continue
        yield worker


def job_of(arm: Arm, path: Path, threads: int, text: list[int], peers: Path) -> Job:
    """What a process runs for an arm. text: prompt and continuation."""
    return Job(arm.program, str(path), threads, len(text), text, str(peers), arm.inputs, arm.kv, arm.repack)


def tokens_of(model: Model, arguments: argparse.Namespace, number: int) -> list[int]:
    """The first tokens of WikiText-2's test text."""
    from subnibble.checkpoint.opening import open_source

    file = arguments.wikitext / "test.raw.txt"
    if not file.is_file():
        sys.exit(f"{file} does not exist; name its folder with --wikitext DIR")
    tokenizer = open_source(original(model, arguments.models)).load_tokenizer()
    # A token has more than one and less than ten characters on average.
    return list(tokenizer(file.read_text()[: 10 * number], add_special_tokens=False)["input_ids"])[:number]


def expected(model: Model, arm: Arm, path: Path, text: list[int], arguments: argparse.Namespace) -> tuple[float, float]:
    """The least and the greatest loss that an arm may have after `SHORT` tokens.

    text: at least SHORT + CHECKED tokens.
    """
    if arm.program == OURS:
        same = _reference(Arm(OURS, arm.bits, arm.head_bits), path, text, arguments)
        near = NEAR + (NEAR_ROUNDED * same if arm.inputs or arm.kv else 0)
        return same - near, same + near
    best = prepared(model, Arm(TRANSFORMERS, 32), arguments.models, arguments.peers)
    loss = _reference(Arm(TRANSFORMERS, 32), best, text, arguments)
    return loss - WORSE[4], loss + WORSE[arm.bits]


def _reference(arm: Arm, path: Path, text: list[int], arguments: argparse.Namespace) -> float:
    """The loss of a model by torch's operations alone; kept in the folder of the models."""
    kept = arguments.models / "losses.json"
    losses: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {}
    name = f"{path.name}, {file_bytes(path)} bytes"
    if name not in losses:
        part = text[: SHORT + CHECKED]
        job = Job(arm.program, str(path), 1, len(part), part, str(arguments.peers), kernels=False)
        with Worker(arm, job, SHORT) as worker:
            worker.ask("open")
            losses[name] = worker.ask(f"score {SHORT}")["loss"]
        kept.write_text(json.dumps(losses, indent=1) + "\n")
    return losses[name]


class Worker:
    """A program in a process of its own, and the row that its answers make.

    arm: what it runs.
    job: the same, for the process.
    context: tokens of the prompt.
    """

    def __init__(self, arm: Arm, job: Job, context: int) -> None:
        self.arm, self._job, self._context = arm, job, context
        self.row: dict[str, Any] = {"arm": arm.name, **asdict(arm), "prompt": [], "decode": []}

    def __enter__(self) -> Self:
        bound = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"} if self._job.threads > 1 else {}
        self._process = subprocess.Popen(
            [sys.executable, WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self._job.threads), "TQDM_DISABLE": "1", **bound},
        )
        self._write(json.dumps(asdict(self._job)))
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to a command of `generate_worker.py`."""
        assert self._process.stdout is not None
        self._write(command)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.arm.name} ended at {command!r} with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise Missing(answer["missing"])
        return answer

    def begin(self, path: Path, bound: tuple[float, float]) -> None:
        """Load, check the predictions and read the prompt for the first time. Raises `RuntimeError` if they are wrong.

        path: what the process loads.
        bound: the least and the greatest loss after `SHORT` tokens.
        """
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            _warm(file)
        answer = self.ask("open")
        self.row |= {"load": answer["seconds"], "load, wall": answer["wall"], "file": file_bytes(path)}
        self.row["read"] = bytes_read(self.arm, path)
        self.row["first"] = self.ask(f"prompt {SHORT}")["seconds"]
        self.row["loss"] = loss = self.ask("loss")["loss"]
        if not bound[0] <= loss <= bound[1] or math.isnan(loss):
            raise RuntimeError(f"{self.arm.name} predicts with a loss of {loss:.3f}; {bound} was expected")
        self.ask("decode 2")
        if self._context > SHORT:
            self.row["first"] = seconds = self.ask(f"prompt {self._context}")["seconds"]
            self.row["prompt"].append(self._context / seconds)
            self.ask("decode 1")
        peak = self.ask("peak")
        self.row |= {"peak": peak["peak"], "cache": peak["cache"]}

    def round(self) -> None:
        """Time once each: the prompt, if it is short, and decoding."""
        if self._context <= SHORT:
            self.row["prompt"].append(self._context / self.ask(f"prompt {self._context}")["seconds"])
        self.row["decode"].append(DECODED / self.ask(f"decode {DECODED}")["seconds"])


def _warm(file: Path) -> None:
    """Read a file, so that it is in the system's file cache."""
    with file.open("rb") as content:
        while content.read(1 << 24):
            pass


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
