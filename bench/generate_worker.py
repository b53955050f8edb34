"""One program of `generate.py` that runs one model in a process of its own, and answers one command a line.

The first line of the input is a JSON object: fields of `Job`. Each further line is a command, and its answer a line of
JSON on what was the standard output when the process began.

| command | answer |
|---|---|
| `open` | seconds to load, or `missing`: why the program cannot run |
| `prompt N` | seconds to read the first N tokens after nothing else, up to the choice of the next token |
| `loss` | mean loss of the text after the prompt that was read last |
| `score N` | mean loss of the text after the first N tokens, in one pass; on subnibble's backends only |
| `decode N` | seconds to decode N tokens greedily after what was read |
| `peak` | peak of resident memory over that after the imports, bytes of keys and values |
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TextIO

# Tokens after a prompt whose loss is the check of a program.
CHECKED = 17


@dataclass(frozen=True)
class Job:
    """What a process runs.

    program: "subnibble", "transformers", or a peer's name.
    path: folder or GGUF file.
    threads: number of threads.
    positions: the most tokens of a sequence.
    text: token ids, more than `positions`.
    peers: where the peers were built.
    inputs, kv: `--activations` and `--kv-bits` of ours, None for as stored.
    repack: ik_llama.cpp's option -rtr.
    kernels: False computes in torch what the kernels would: for the reference.
    """

    program: str
    path: str
    threads: int
    positions: int
    text: list[int]
    peers: str
    inputs: str | None = None
    kv: int | None = None
    repack: bool = False
    kernels: bool = True


class Program(Protocol):
    """A loaded model with one sequence."""

    def prompt(self, tokens: list[int]) -> int:
        """Read a prompt after nothing else; returns the most likely next token."""

    def decode(self, token: int, number: int) -> int:
        """Decode tokens greedily, the first from `token`; returns the last."""

    def loss(self, tokens: list[int]) -> float:
        """Append a text token by token; returns the mean loss of all but the first token."""


class OnBackend:
    """A model on one of subnibble's backends: the native step, or transformers through torch. job: what to run."""

    def __init__(self, job: Job) -> None:
        from subnibble.generate.loop import CHUNK
        from subnibble.generate.opening import Loading, OpenedModel

        self._chunk = CHUNK
        name, dtype = ("native", "bfloat16") if job.program == "subnibble" and job.kernels else ("torch", "float32")
        loading = Loading(dtype=dtype, device="cpu", kv_bits=job.kv, activations=job.inputs)
        self._backend = OpenedModel.of(Path(job.path), None, name, loading).backend
        self._slot = self._backend.open()

    def prompt(self, tokens: list[int]) -> int:
        """Read a prompt after nothing else; returns the most likely next token."""
        self._backend.close(self._slot)
        self._slot = self._backend.open()
        for start in range(0, len(tokens), self._chunk):
            logits = self._backend.forward([self._slot], [tokens[start : start + self._chunk]])
        return int(logits.argmax())

    def decode(self, token: int, number: int) -> int:
        """Decode tokens greedily, the first from `token`; returns the last."""
        for _ in range(number):
            token = int(self._backend.forward([self._slot], [[token]]).argmax())
        return token

    def loss(self, tokens: list[int]) -> float:
        """Append a text token by token; returns the mean loss of all but the first token."""
        losses = []
        for token, following in pairwise(tokens):
            losses.append(-self._backend.forward([self._slot], [[token]])[0].log_softmax(-1)[following].item())
        return sum(losses) / len(losses)

    def score(self, tokens: list[int], start: int) -> float:
        """Mean loss of the tokens after the first `start` + 1, in one pass."""
        following = _column(tokens[start + 1 :])
        losses = self._backend.logits(tokens)[start:-1].log_softmax(-1).gather(1, following)
        return -float(losses.mean())

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values; 0 if the backend does not count them."""
        return int(getattr(self._backend, "nbytes", 0))


def _column(tokens: list[int]) -> Any:
    """Token ids as a column of torch's."""
    import torch

    return torch.tensor(tokens).unsqueeze(1)


def imported(job: Job) -> None:
    """Import and link what loading and running need."""
    if job.program in ("subnibble", "transformers"):
        import torch
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401

        import subnibble.generate.generator  # noqa: F401
        from subnibble.kernels import native

        torch.set_num_threads(job.threads)
        if not job.kernels:
            native.choose_(native.TORCH)
    else:
        from peers.llama_model import loaded

        loaded(_library(job), Path(job.peers))


def opened(job: Job) -> Program:
    """The loaded model. Raises `Missing` if it cannot run."""
    if job.program in ("subnibble", "transformers"):
        return OnBackend(job)
    from peers.llama_model import LlamaModel

    return LlamaModel(Path(job.path), job.positions, job.threads, Path(job.peers), _library(job), job.repack)


def _library(job: Job) -> Any:
    from peers.build import IK_MODEL, LLAMA_MODEL

    return next(library for library in (IK_MODEL, LLAMA_MODEL) if library.source.name == job.program)


def resident_peak() -> int:
    """Peak of this process's resident memory, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def serve(job: Job, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until the input ends."""
    from peers.product import Missing

    program: Any = None
    base, position, token, clock = 0, 0, 0, time.process_time if job.threads == 1 else time.perf_counter
    for line in commands:
        command, _, number = line.strip().partition(" ")
        answer: dict[str, Any] = {}
        start, wall = clock(), time.perf_counter()
        match command:
            case "open":
                try:
                    imported(job)
                    base = resident_peak()
                    start, wall = clock(), time.perf_counter()
                    program = opened(job)
                except Missing as missing:
                    answer["missing"] = str(missing)
            case "prompt":
                position = int(number)
                token = program.prompt(job.text[:position])
            case "decode":
                token = program.decode(token, int(number))
            case "loss":
                answer["loss"] = program.loss(job.text[position : position + CHECKED])
            case "score":
                answer["loss"] = program.score(job.text[: int(number) + CHECKED], int(number))
            case "peak":
                answer |= {"peak": resident_peak() - base, "cache": getattr(program, "cache_bytes", 0)}
        answer |= {"seconds": clock() - start, "wall": time.perf_counter() - wall, "token": token}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Job(**json.loads(sys.stdin.readline())), sys.stdin, ours)
