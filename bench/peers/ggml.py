"""Products of llama.cpp's and ik_llama.cpp's quantized types, by libraries that `build.py` makes of their sources."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peers.build import IK_PRODUCTS, LLAMA_PRODUCTS, Library
from peers.product import Method, Missing, Tolerance, Weight

# Name of a type in ggml -> (bits, inputs that share a scale of 8 bits). Types of 256 weights take no other columns.
_TYPES = {"q4_0": (4, 32), "q8_0": (8, 32), "q2_K": (2, 256), "q3_K": (3, 256), "iq2_k": (2, 256)}
_TYPES_OF = {LLAMA_PRODUCTS: ("q2_K", "q3_K", "q4_0", "q8_0"), IK_PRODUCTS: ("q2_K", "iq2_k", "q3_K", "q4_0", "q8_0")}


def methods(built: Library, folder: Path) -> list[Method]:
    """Types of one program. ik_llama.cpp's come with rows interleaved, too, as its option -rtr does.

    folder: where `build.py` built the library.
    """
    file = built.file(folder)
    if not file.is_file():
        raise Missing(f"{file} does not exist: python bench/peers/build.py")
    forms = (False, True) if built is IK_PRODUCTS else (False,)
    return [
        Method(f"{built.source.name} {name}{' rtr' if repack else ''}", _TYPES[name][0], _maker(file, name, repack))
        for name in _TYPES_OF[built]
        for repack in forms
    ]


@cache
def _library(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.weights_new.argtypes = [ctypes.c_char_p, number, number, integer, integer, pointer, ctypes.POINTER(number)]
    library.weights_kept.argtypes = library.weights_free.argtypes = [pointer]
    library.weights_kept.restype = ctypes.c_char_p
    library.graph_new.argtypes = [pointer, integer, number, integer]
    for name in ("weights_new", "graph_new", "graph_x", "graph_y"):
        getattr(library, name).restype = pointer
    for name in ("graph_x", "graph_y", "graph_run", "graph_free"):
        getattr(library, name).argtypes = [pointer]
    return library


@dataclass
class _Weights:
    """Copies in ggml's memory."""

    library: ctypes.CDLL
    handle: int
    dense: Tensor
    bits: float
    tolerance: Tolerance
    copies: int

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def bind(self, x: Tensor, copies: int) -> Callable[[], Tensor]:
        graph = _Graph(self, x, copies)
        return graph.run

    def __del__(self) -> None:
        self.library.weights_free(self.handle)


class _Graph:
    """A graph of products of the same tokens: it is freed with its last reference."""

    def __init__(self, weights: _Weights, x: Tensor, copies: int) -> None:
        self._weights, library = weights, weights.library
        self._handle = library.graph_new(weights.handle, copies, len(x), torch.get_num_threads())
        self._compute = library.graph_run
        ctypes.memmove(library.graph_x(self._handle), x.contiguous().data_ptr(), 4 * x.numel())
        rows = weights.dense.shape[0]
        result = (ctypes.c_float * (len(x) * rows)).from_address(library.graph_y(self._handle))
        self._y = torch.from_numpy(np.frombuffer(result, np.float32)).view(len(x), rows)

    def run(self) -> Tensor:
        if self._compute(self._handle):
            raise RuntimeError("ggml could not compute the graph")
        return self._y

    def __del__(self) -> None:
        self._weights.library.graph_free(self._handle)


def _maker(file: Path, name: str, repack: bool) -> Callable[[Tensor, Callable[[float], int]], Weight]:
    def make(weight: Tensor, copies: Callable[[float], int]) -> Weight:
        library, dense, size = _library(file), weight.clone(), ctypes.c_int64()
        rows, columns = weight.shape
        bits, block = _TYPES[name]
        if columns % block:
            raise Missing(f"{name} takes columns that {block} divides, not {columns}")
        number = copies(bits)
        arguments = (name.encode(), columns, rows, number, int(repack), dense.data_ptr(), ctypes.byref(size))
        handle = library.weights_new(*arguments)
        if handle is None:
            raise Missing(f"{file.name} has no type {name}")
        read = 8 * size.value / weight.numel()
        weights = _Weights(library, handle, dense, read, Tolerance(block=block), number)
        if repack and library.weights_kept(handle) == name.encode():
            raise Missing(f"{name} is not repacked")
        return weights

    return make
