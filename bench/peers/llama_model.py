"""Whole models that llama.cpp and ik_llama.cpp run in this process, by libraries that `build.py` makes."""

from __future__ import annotations

import ctypes
from pathlib import Path

from peers.build import LLAMA_MODEL, Library
from peers.product import Missing

# Numbers of llama-quantize's types, `llama_ftype` in llama.h.
TYPES = {"Q4_0": 2, "Q2_K": 10, "Q3_K": 11, "IQ2_K": 138, "IQ2_KS": 147, "IQ2_KT": 151, "IQ2_KL": 155}


class LlamaModel:
    """SmolLM2 or another model from a GGUF file.

    file: GGUF.
    positions: the most tokens of a prompt and its continuation.
    library: of the program that runs it.
    repack: interleave rows when the model is loaded (ik_llama.cpp only; llama.cpp repacks what it can).
    """

    def __init__(
        self,
        file: Path,
        positions: int,
        threads: int,
        folder: Path,
        library: Library = LLAMA_MODEL,
        repack: bool = False,
    ) -> None:
        self._library = loaded(library, folder)
        self._handle = self._library.model_new(str(file).encode(), positions, threads, repack)
        if self._handle is None:
            raise Missing(f"{library.source.name} cannot load {file}")

    def prompt(self, tokens: list[int]) -> int:
        """Read a prompt after nothing else; return the most likely next token, -1 if it cannot be read."""
        return self._library.model_prompt(self._handle, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens))

    def decode(self, token: int, number: int) -> int:
        """Decode a number of tokens greedily after what was read, the first of them from `token`; return the last."""
        return self._library.model_decode(self._handle, token, number)

    def loss(self, tokens: list[int]) -> float:
        """Append a text token by token; return the mean loss of all but the first token."""
        return self._library.model_loss(self._handle, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.model_free(self._handle)


def requantize(
    file: Path, out: Path, folder: Path, library: Library = LLAMA_MODEL, kind: str = "Q4_0", head: str = ""
) -> None:
    """Write a GGUF file in another type, as llama-quantize does.

    kind: a name of `TYPES`.
    head: type of embedding and head ("q6_K"), all other matrices then have `kind` alone; "" for llama-quantize's mix.
    """
    paths = str(file).encode(), str(out).encode()
    if loaded(library, folder).model_quantize(*paths, 2, TYPES[kind], head.encode()):
        raise Missing(f"{library.source.name} cannot write {file} as {kind}")


def loaded(built: Library, folder: Path) -> ctypes.CDLL:
    """The library of a program that runs whole models; raises `Missing` if it is not built."""
    file = built.file(folder)
    if not file.is_file():
        raise Missing(f"{file} does not exist: python bench/peers/build.py")
    library = ctypes.CDLL(str(file))
    text, pointer, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32
    numbers = ctypes.POINTER(number)
    library.model_quantize.argtypes = [text, text, number, number, text]
    library.model_new.argtypes, library.model_new.restype = [text, ctypes.c_uint32, number, number], pointer
    library.model_prompt.argtypes = [pointer, numbers, number]
    library.model_decode.argtypes = [pointer, number, number]
    library.model_loss.argtypes, library.model_loss.restype = [pointer, numbers, number], ctypes.c_double
    library.model_free.argtypes = [pointer]
    return library
