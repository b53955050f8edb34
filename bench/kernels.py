"""Time a packed linear's product against torch's, in one process and on one thread.

    python bench/kernels.py [--isa NAME ...] [--threads N]

Groups of 128 with integer zero-points, inputs in float32. Every round times all methods in turn; figures are the least
microseconds of CPU time a call (of wall time with several threads), over copies of the weight that do not fit the
processor's cache. The kernels' results are checked first: outside the error bound, nothing is timed. "float32" and
"bfloat16" are dense products; "int4pack" is torch's weight-only product of 4 bits in bfloat16, None where the shape has
no such product. "read" is the time to sum a dense float32 weight, as GB/s.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from measure import environment, print_table

if TYPE_CHECKING:
    from subnibble.tensor.packed import PackedTensor

SHAPES = ((4096, 4096), (1536, 576), (576, 1536))
TOKENS = (1, 4, 16, 128)
BITS = (2, 3, 4, 8)
GROUP = 128
# Together, the copies of a dense float32 weight have at least this many bytes.
COLD = 2**28
ROUNDS = 5


def main() -> None:
    """Check the kernels, time them, and print a table, or JSON rows."""
    from subnibble.kernels import native as kernels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = kernels.instruction_sets()
    parser.add_argument("--isa", action="append", choices=sets, help="time these instruction sets; default: fastest")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    if not sets:
        sys.exit(f"{kernels.why_missing()}: nothing to time")
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    facts, rows = environment(), []
    for shape in SHAPES:
        for row in measured(shape, arguments.isa or [sets[0]], clock):
            rows.append({**row, **facts})
            print(f"{shape} {row['tokens']}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    names = [name for name in rows[0] if name not in ("shape", "tokens", *facts)]
    print_table(("shape", "tokens", *names), [[row["shape"], str(row["tokens"]), *_cells(row, names)] for row in rows])


def _cells(row: dict[str, Any], names: list[str]) -> list[str]:
    return ["-" if row[name] is None else f"{row[name]:.0f}" for name in names]


def measured(shape: tuple[int, int], isas: list[str], clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Time all methods on a weight of `shape` (rows, columns): a row for each number of tokens."""
    rows, columns = shape
    copies = max(2, -(-COLD // (4 * rows * columns)))
    dense = [torch.randn(rows, columns) for _ in range(copies)]
    narrow = [weight.bfloat16() for weight in dense]
    # Packed weights are smaller: more copies, so that they do not stay in the cache, either.
    weights = {bits: [packed(dense[0], bits)] for bits in BITS}
    for bits, ones in weights.items():
        ones += [copied(ones[0]) for _ in range(copies * 8 // bits)]
    int4 = _int4pack(dense[0], copies)
    table = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns)
        check(x, [ones[0] for ones in weights.values()], isas)
        calls = _calls(x, isas, weights, dense, narrow, int4)
        figures = least(calls, clock, tokens)
        read = figures.pop("read")
        assert read is not None
        shape_name = {"shape": f"{rows}x{columns}", "tokens": tokens}
        table.append({**shape_name, **figures, "read, GB/s": 4 * rows * columns / read / 1e3})
    return table


def packed(weight: torch.Tensor, bits: int) -> PackedTensor:
    """Round a dense weight to the nearest codes."""
    from subnibble.rounding.grid import Clip, quantized
    from subnibble.tensor.packed import PackedRange, PackedTensor
    from subnibble.tensor.scheme import Scheme

    scheme = Scheme(bits, GROUP)
    return PackedTensor((PackedRange.pack(quantized(weight, scheme, Clip("minmax")), scheme),))


def copied(weight: PackedTensor) -> PackedTensor:
    """The same weight at other addresses."""
    from subnibble.tensor.packed import PackedTensor

    state = {name: tensor.clone() for name, tensor in weight.state().items()}
    return PackedTensor.from_state(state, weight.layout)


def check(x: torch.Tensor, weights: list[PackedTensor], isas: list[str]) -> None:
    """End the process unless every product is within `2 eps sqrt(K) (|x| @ |w|)` of the one in float64."""
    from subnibble.kernels.native import chosen
    from subnibble.runtime import ops
    from subnibble.tensor.linear import Linear, PackedWeight

    for weight in weights:
        wide = weight.dequantize().double()
        exact, size = x.double() @ wide.T, x.double().abs() @ wide.abs().T
        bound = 2 * torch.finfo(torch.float32).eps * wide.shape[1] ** 0.5 * size
        for isa in isas:
            with chosen(isa):
                y = ops.linear(x, Linear(PackedWeight(weight)))
            if not bool(((y.double() - exact).abs() <= bound).all()):
                sys.exit(f"{isa}: a product of {weight.layout} with {x.shape[0]} tokens is wrong; nothing is timed")


def _int4pack(weight: torch.Tensor, copies: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Copies of a weight for torch's 4-bit product: codes and (scale, zero) of each group; None if it takes none."""
    rows, columns = weight.shape
    if columns % GROUP or rows % 16:
        return None
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    scales = torch.rand(columns // GROUP, rows, 2).bfloat16()
    return [(torch._convert_weight_to_int4pack_for_cpu(codes, 1), scales.clone()) for _ in range(copies)]


def _calls(
    x: torch.Tensor,
    isas: list[str],
    weights: dict[int, list[PackedTensor]],
    dense: list[torch.Tensor],
    narrow: list[torch.Tensor],
    int4: list[tuple[torch.Tensor, torch.Tensor]] | None,
) -> dict[str, tuple[int, Callable[[int], object]] | None]:
    """Name of a method -> (number of copies of its weight, call with the number of a copy)."""
    from subnibble.kernels.native import chosen
    from subnibble.runtime import ops
    from subnibble.tensor.linear import Linear, PackedWeight

    half = x.bfloat16()
    calls: dict[str, tuple[int, Callable[[int], object]] | None] = {
        "float32": (len(dense), lambda i: torch.nn.functional.linear(x, dense[i])),
        "bfloat16": (len(narrow), lambda i: torch.nn.functional.linear(half, narrow[i])),
        "int4pack": None,
        "read": (len(dense), lambda i: dense[i].sum()),
    }
    if int4 is not None:
        calls["int4pack"] = (
            len(int4),
            lambda i: torch._weight_int4pack_mm_for_cpu(half, int4[i][0], GROUP, int4[i][1]),
        )
    for isa in isas:
        for bits, ones in weights.items():
            linears = [Linear(PackedWeight(one)) for one in ones]

            def call(i: int, linears: list[Linear] = linears, isa: str = isa) -> object:
                with chosen(isa):
                    return ops.linear(x, linears[i])

            calls[f"{isa} {bits}"] = (len(linears), call)
    return calls


def least(
    calls: dict[str, tuple[int, Callable[[int], object]] | None], clock: Callable[[], float], tokens: int
) -> dict[str, float | None]:
    """Return the least microseconds a call of each method; methods run in turn in every round."""
    figures: dict[str, float | None] = dict.fromkeys(calls)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, method in calls.items():
                if method is None:
                    continue
                copies, call = method
                repeats = copies if tokens == 1 else min(copies, 4)
                start = clock()
                for index in range(repeats):
                    call(index)
                spent = 1e6 * (clock() - start) / repeats
                figures[name] = min(spent, figures[name] or spent)
    return figures


if __name__ == "__main__":
    main()
