"""Limits of this machine, measured beside the products: reading memory, int8 products, float32 products."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from peers.product import Missing

# Far more than the caches hold.
READ_BYTES = 2**29
STEPS = 2_000_000


def peaks() -> dict[str, tuple[Callable[[], object], float]]:
    """Name of a limit -> (function that runs once, billions of operations or bytes of one run), for torch's threads."""
    library, threads = _library(), torch.get_num_threads()
    data = torch.ones(READ_BYTES, dtype=torch.uint8)
    steps = {name: ctypes.c_int64(STEPS) for name in ("float_operations", "int8_operations")}
    operations = {name: getattr(library, name)(1, threads) * STEPS / 1e9 for name in steps}

    def read() -> None:
        library.read_memory(data.data_ptr(), READ_BYTES, threads)

    return {
        "read, GB/s": (read, READ_BYTES / 1e9),
        "int8, GOP/s": (lambda: library.int8_operations(STEPS, threads), operations["int8_operations"]),
        "float32, GFLOP/s": (lambda: library.float_operations(STEPS, threads), operations["float_operations"]),
    }


def _library() -> ctypes.CDLL:
    """Compile peaks.cpp for this processor. torch's OpenMP is in the process already, and is the one that it uses."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peaks.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17"]
        command = ["c++", *flags, str(Path(__file__).with_name("peaks.cpp")), "-o", str(file)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Missing(f"the limits of this machine need a C++ compiler: {error}") from None
        library = ctypes.CDLL(str(file))
    for name in ("float_operations", "int8_operations"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int], ctypes.c_double
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return library
