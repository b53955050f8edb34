"""Every example in docs/format.md is what the code does."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from subnibble.checkpoint.packed import PackedConfig, PackedLinearEntry
from subnibble.checkpoint.size import measure
from subnibble.scheme import Scheme
from subnibble.tensor import PackedLayout, PackedTensor, pack_codes, scale_dtype, unpack_codes

DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
CONFIG, VECTORS = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOC, re.DOTALL))
STREAMS = re.findall(r"^bits (\d): codes ([\d ]+) -> bytes ([0-9a-f ]+)$", DOC, re.MULTILINE)
TENSORS = re.findall(r"^\| `(model\.\S+)` \| (\w+) \| \((\d+), (\d+)\) \|$", DOC, re.MULTILINE)
TYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
WIDTHS = {"U8": 8, "F16": 16, "BF16": 16, "F32": 32}


def bytes_row(text: str) -> torch.Tensor:
    return torch.tensor([list(bytes.fromhex(text))], dtype=torch.uint8)


def test_the_examples_are_found() -> None:
    assert {bits for bits, _, _ in STREAMS} == {"2", "3", "4", "8"}
    assert {vector["scheme"]["zero_point"] for vector in VECTORS} == {"none", "integer", "real"}
    assert {vector["scheme"]["grid"] for vector in VECTORS} == {"uniform", "sign"}
    kinds = {entry["kind"] for entry in CONFIG["modules"].values()}
    assert kinds == {"linear", "embedding", "tied_head", "norm_bias"}


@pytest.mark.parametrize(("bits", "codes", "stream"), STREAMS)
def test_codes_pack_to_the_documented_bytes(bits, codes, stream) -> None:
    row = torch.tensor([[int(code) for code in codes.split()]], dtype=torch.uint8)
    assert torch.equal(pack_codes(row, int(bits)), bytes_row(stream))
    assert torch.equal(unpack_codes(bytes_row(stream), int(bits), row.shape[1]), row)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: Scheme.from_dict(vector["scheme"]).name)
def test_stored_rows_have_the_documented_weights(vector) -> None:
    scheme = Scheme.from_dict(vector["scheme"])
    state = {"codes": bytes_row(vector["codes"])}
    state["scales"] = torch.tensor([vector["scales"]], dtype=scale_dtype(scheme))
    if scheme.zero_point == "integer":
        state["zeros"] = bytes_row(vector["zeros"])
    elif scheme.zero_point == "real":
        state["zeros"] = torch.tensor([vector["zeros"]], dtype=scale_dtype(scheme))
    packed = PackedTensor.from_state(state, PackedLayout(1, ((vector["columns"], scheme),)))
    assert packed.dequantize().tolist() == [vector["weights"]]


def test_the_documented_config_is_read_and_written_back_the_same() -> None:
    assert PackedConfig.from_dict(CONFIG).to_dict() == CONFIG


def test_the_documented_config_stores_the_documented_tensors() -> None:
    stored = []
    for path, entry in PackedConfig.from_dict(CONFIG).modules.items():
        layout = getattr(entry, "layout", None)
        for name, tensor in ({} if layout is None else layout.empty().state()).items():
            stored.append((f"{path}.{name}", TYPES[tensor.dtype], *map(str, tensor.shape)))
    assert stored == TENSORS


class ExampleSource:
    """The documented checkpoint, seen through its headers: one weight file of 20000 bytes, biases in F32."""

    path = Path("example")
    config = SimpleNamespace(model_type="llama", quantization_config=CONFIG)

    def __init__(self) -> None:
        tensors = {name: ((int(rows), int(columns)), WIDTHS[kind]) for name, kind, rows, columns in TENSORS}
        biases = re.findall(r"`(\S+\.bias)` \((\d+)\)", DOC)
        self.tensors = tensors | {name: ((int(rows),), 32) for name, rows in biases}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][0]

    def stored_bits(self, name: str) -> int:
        shape, width = self.tensors[name]
        return width * math.prod(shape)

    def file_bytes(self) -> int:
        return 20000


def test_the_documented_bits_are_those_that_are_measured() -> None:
    entries = PackedConfig.from_dict(CONFIG).modules.values()
    linears = [entry.layout for entry in entries if isinstance(entry, PackedLinearEntry)]
    terms = re.search(r"take 64 \* \(([\d +]+)\) and 64 \* \(([\d +]+)\) bits", DOC).groups()
    documented = [64 * sum(map(int, term.split("+"))) for term in terms]
    assert documented == [layout.stored_bits for layout in linears]
    size = measure(ExampleSource())
    assert f"these are {size.effective_bits:.3f} effective bits" in DOC
    # The table, both linears, and two biases.
    assert size.parameters == 100 * 64 + 64 * 64 + 64 * 72 + 64 + 64
    assert size.model_bits == 8 * 20000 / size.parameters
