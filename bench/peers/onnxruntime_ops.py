"""onnxruntime's MatMulNBits with inputs rounded to 8 bits (accuracy_level 4), 2, 4 and 8 bits a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peers.product import Codes, Method, Missing, Tolerance, Weight, symmetric

BITS = (2, 4, 8)
# Inputs are rounded to 8 bits.
ACCURACY_LEVEL = 4


def methods() -> list[Method]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Missing(f"{error}: pip install onnxruntime onnx") from None
    del onnx, onnxruntime
    return [Method(f"onnxruntime w{bits}", bits, _maker(bits)) for bits in BITS]


@dataclass
class _Session:
    """A graph of products of the same tokens with each copy: one run of the graph is the copies' products."""

    session: Any
    first: Any
    dense: Tensor
    bits: float
    tolerance: Tolerance
    copies: int

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def bind(self, x: Tensor, copies: int) -> Callable[[], Tensor]:
        import numpy as np

        session = self.session if copies > 1 else self.first
        binding = session.io_binding()
        tokens = np.ascontiguousarray(x.numpy())
        names = [output.name for output in session.get_outputs()]
        results = {name: np.empty((len(x), self.dense.shape[0]), np.float32) for name in names}
        binding.bind_input("x", "cpu", 0, np.float32, tokens.shape, tokens.ctypes.data)
        for name, result in results.items():
            binding.bind_output(name, "cpu", 0, np.float32, result.shape, result.ctypes.data)
        last = torch.from_numpy(results[names[-1]])

        def run(kept: object = (tokens, results)) -> Tensor:
            session.run_with_iobinding(binding)
            return last

        return run


def _maker(bits: int) -> Callable[[Tensor, Callable[[float], int]], Weight]:
    def make(weight: Tensor, copies: Callable[[float], int]) -> Weight:
        codes = symmetric(weight, bits)
        read = bits + 32 / codes.group
        number = copies(read)
        session, first = (_session(codes, bits, count) for count in (number, 1))
        return _Session(session, first, codes.dense(), read, Tolerance(block=codes.group), number)

    return make


def _session(codes: Codes, bits: int, copies: int) -> Any:
    """A session whose graph has a product for each copy. Scales are float32, zero-points in the middle.

    onnxruntime would merge products of equal weights, so every copy but the last one has its rows rotated.
    """
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    rows, columns = codes.codes.shape
    packed, scales = _packed(codes, bits).numpy(), codes.scales.numpy()
    nodes, constants, results = [], [], []
    for index in range(copies):
        for name, array in (("w", packed), ("s", scales)):
            rotated = np.roll(array, copies - 1 - index, 0)
            constants.append(onnx.numpy_helper.from_array(rotated, f"{name}{index}"))
        settings = {"K": columns, "N": rows, "bits": bits, "block_size": codes.group, "accuracy_level": ACCURACY_LEVEL}
        names = ["x", f"w{index}", f"s{index}"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"y{index}"], domain="com.microsoft", **settings))
        results.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, ["t", rows]))
    tokens = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", columns])]
    graph = helper.make_graph(nodes, "products", tokens, results, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    _pin(options, torch.get_num_threads())
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _pin(options: Any, threads: int) -> None:
    """A pool of `threads` threads: this one, and one on each further processor. They do not spin after a run."""
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads > 1:
        others = ";".join(str(processor + 1) for processor in range(1, threads))
        options.add_session_config_entry("session.intra_op_thread_affinities", others)


def _packed(codes: Codes, bits: int) -> Tensor:
    """(n, blocks, bytes) uint8: 8 / bits codes a byte, the first one lowest, from 0."""
    rows = codes.codes.shape[0]
    whole = (codes.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    parts = whole.view(rows, -1, codes.group * bits // 8, 8 // bits)
    out = torch.zeros(parts.shape[:-1], dtype=torch.uint8)
    for index in range(8 // bits):
        out |= parts[..., index] << (bits * index)
    return out.contiguous()
