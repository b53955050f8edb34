"""What `generate.py` measures: models, the programs and settings that run them, and the files that they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import second_model
from peers.build import IK, IK_MODEL, LLAMA, LLAMA_MODEL
from peers.gguf_tensors import tensors_of

OURS, TRANSFORMERS = "subnibble", "transformers"
LIBRARIES = {library.source.name: library for library in (LLAMA_MODEL, IK_MODEL)}
# Up to this length a prompt is read again in every round; longer ones are read once.
SHORT = 512


@dataclass(frozen=True)
class Model:
    """A model of the bench.

    name: in tables.
    key: beginning of its files' names.
    head: ggml's type of embedding and head in peers' files, "" for llama-quantize's mix.
    head_bits: of ours, in the arms that do not say otherwise.
    """

    name: str
    key: str
    head: str
    head_bits: int = 8


SMALL = Model("SmolLM2-135M", "smollm2", "")
LARGE = Model("Qwen2.5-Coder-1.5B", "qwen-1.5b", "q6_K")
MODELS = (SMALL, LARGE)


@dataclass(frozen=True)
class Arm:
    """A program and its setting.

    program: `OURS`, `TRANSFORMERS`, or a peer's name.
    bits: nominal bits of a weight.
    head_bits: bits of ours' embedding and head.
    inputs, kv: `--activations` and `--kv-bits` of ours, None for as stored.
    kind: a peer's type of weights.
    repack: ik_llama.cpp's option -rtr.
    """

    program: str
    bits: int
    head_bits: int = 0
    inputs: str | None = None
    kv: int | None = None
    kind: str = ""
    repack: bool = False

    @property
    def name(self) -> str:
        """As tables show it."""
        if self.program == TRANSFORMERS:
            return "transformers float32"
        if self.program != OURS:
            return f"{self.program} {self.kind}{' rtr' if self.repack else ''}"
        return f"subnibble w{self.bits}a{8 if self.inputs else 16}kv{self.kv or 16}, head {self.head_bits}"


def ours(bits: int, head_bits: int, inputs: str | None = None, kv: int | None = None) -> Arm:
    """An arm of ours. Arguments: see `Arm`."""
    return Arm(OURS, bits, head_bits, inputs, kv)


def arms(model: Model, context: int) -> Iterator[Arm]:
    """What is compared in one run: all programs that run a model with contexts of a length."""
    small = model == SMALL
    if context <= SHORT:
        for bits, head in ((2, 8), (3, 8), (4, 8)) if small else ((2, 4), (3, 8), (4, 8)):
            yield from (ours(bits, head, inputs) for inputs in (None, "int8"))
        yield Arm(TRANSFORMERS, 32)
    else:
        bits, head = (3, 8) if small else (2, 4)
        yield from (ours(bits, head, "int8", kv) for kv in (None, 4))
    yield Arm(LLAMA.name, 4, kind="Q4_0")
    if small:
        yield Arm(IK.name, 4, kind="Q4_0", repack=True)
    else:
        kinds = ("Q2_K", "IQ2_K") if context <= SHORT else ("Q2_K",)
        yield from (Arm(IK.name, 2, kind=kind, repack=True) for kind in kinds)


def original(model: Model, models: Path) -> Path:
    """The GGUF file that a model is made from; raises `Missing` if it is not there.

    models: folder of the models.
    """
    from peers.product import Missing
    from subnibble.packaged.model import find_model

    if model == SMALL:
        return find_model()
    if not second_model.gguf(models).is_file():
        raise Missing(f"{second_model.gguf(models)} does not exist: python bench/second_model.py")
    return second_model.gguf(models)


def prepared(model: Model, arm: Arm, models: Path, peers: Path) -> Path:
    """The folder or file that an arm runs, written on the first call; raises `Missing` if that is impossible.

    Ours are rounded to nearest between the extremes of each group, because a method does not change the operations
    that run.

    models: folder of the models.
    peers: where the peers were built.
    """
    file = original(model, models)
    if arm.program == TRANSFORMERS:
        return file if model == SMALL else second_model.converted(models)
    if arm.program != OURS:
        return _requantized(model, arm, file, models, peers)
    out = models / f"{model.key}-w{arm.bits}-head{arm.head_bits}"
    if not out.is_dir():
        from subnibble import Recipe, quantize

        recipe = Recipe("rtn", arm.bits, embedding_bits=arm.head_bits, options={"clip": "minmax"})
        quantize(file, out, recipe)
    return out


def _requantized(model: Model, arm: Arm, file: Path, models: Path, peers: Path) -> Path:
    from peers.llama_model import requantize
    from peers.product import Missing

    library = LIBRARIES[arm.program]
    if not library.file(peers).is_file():
        raise Missing(f"{library.file(peers)} does not exist: python bench/peers/build.py")
    out = models / f"{model.key}-{arm.kind.lower()}.gguf"
    if not out.is_file():
        unfinished = out.with_suffix(".part")
        # In a process of its own: libraries of both programs in one process crash when it ends.
        child = get_context("spawn").Process(
            target=requantize, args=(file, unfinished, peers, library, arm.kind, model.head)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise Missing(f"{arm.program} cannot write {file} as {arm.kind}")
        unfinished.rename(out)
    return out


def file_bytes(path: Path) -> int:
    """Bytes of a model's weight files."""
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".gguf"))


def bytes_read(arm: Arm, path: Path) -> int:
    """Bytes of weights that a token reads: all but the embedding, unless the head is the same matrix.

    path: of `prepared`.
    """
    if arm.program == OURS:
        return _stored(path)
    if arm.program != TRANSFORMERS:
        sizes = dict(tensors_of(path))
        return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
    from subnibble.checkpoint.opening import open_source

    source = open_source(path)
    sizes = {name: _count(source.shape(name)) for name in source.names()}
    return 4 * sum(size for name, size in sizes.items() if not is_unread(name, sizes))


def is_unread(name: str, names: Any) -> bool:
    """Whether a tensor is the embedding of a model whose head is another matrix.

    name: of the tensor, as transformers names it.
    names: of all tensors.
    """
    return name.startswith("model.embed_tokens.") and any(other.startswith("lm_head.") for other in names)


def _stored(folder: Path) -> int:
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            sizes |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
    return sum(size for name, size in sizes.items() if not is_unread(name, sizes))


def _count(shape: tuple[int, ...]) -> int:
    result = 1
    for axis in shape:
        result *= axis
    return result
