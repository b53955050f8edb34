"""Whole models that llama.cpp runs in this process, by a library that `build.py` makes of its sources."""

from __future__ import annotations

import ctypes
from pathlib import Path

from peers.build import LLAMA_MODEL, Library
from peers.product import Missing


class LlamaModel:
    """SmolLM2 or another model from a GGUF file.

    file: GGUF.
    positions: the most tokens of a prompt and its continuation.
    """

    def __init__(self, file: Path, positions: int, threads: int, folder: Path) -> None:
        self._library = _loaded(LLAMA_MODEL, folder)
        self._handle = self._library.model_new(str(file).encode(), positions, threads)
        if self._handle is None:
            raise Missing(f"llama.cpp cannot load {file}")

    def prompt(self, tokens: list[int]) -> int:
        """Read a prompt after nothing else; return the most likely next token."""
        return self._library.model_prompt(self._handle, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens))

    def decode(self, token: int, number: int) -> int:
        """Decode a number of tokens greedily after what was read, the first of them from `token`; return the last."""
        return self._library.model_decode(self._handle, token, number)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.model_free(self._handle)


def requantize(file: Path, out: Path, folder: Path) -> None:
    """Write a GGUF file as Q4_0, as llama-quantize does."""
    if _loaded(LLAMA_MODEL, folder).model_quantize(str(file).encode(), str(out).encode(), 1):
        raise Missing(f"llama.cpp cannot write {file} as Q4_0")


def _loaded(built: Library, folder: Path) -> ctypes.CDLL:
    file = built.file(folder)
    if not file.is_file():
        raise Missing(f"{file} does not exist: python bench/peers/build.py")
    library = ctypes.CDLL(str(file))
    text, pointer, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32
    library.model_quantize.argtypes = [text, text, number]
    library.model_new.argtypes, library.model_new.restype = [text, ctypes.c_uint32, number], pointer
    library.model_prompt.argtypes = [pointer, ctypes.POINTER(number), number]
    library.model_decode.argtypes = [pointer, number, number]
    library.model_free.argtypes = [pointer]
    return library
