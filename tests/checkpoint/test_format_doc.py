"""Every example in docs/format.md is what the code does."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linears import changed
from subnibble.checkpoint.manifest import FORMAT_VERSION, PackedConfig, stored_shapes
from subnibble.checkpoint.module_specs import PackedLinearSpec, linear_of
from subnibble.checkpoint.size import measure
from subnibble.runtime.activations import quantize
from subnibble.runtime.kv_cache import quantize_rows
from subnibble.runtime.ops import linear
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.hadamard import hadamard
from subnibble.tensor.linear import Linear
from subnibble.tensor.mxfp4 import E2M1
from subnibble.tensor.packed import PackedLayout, PackedTensor, pack_codes, scale_dtype, unpack_codes
from subnibble.tensor.scheme import Scheme

DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
CONFIG, VECTORS, WITH_TERMS, TOKENS, LINEAR, WITH_CACHE, ROWS, WITH_CENTER, WITH_HEAD_INPUT = (
    json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOC, re.DOTALL)
)
DOWN = "model.layers.0.mlp.down_proj"
STREAMS = re.findall(r"^bits (\d): codes ([\d ]+) -> bytes ([0-9a-f ]+)$", DOC, re.MULTILINE)
TENSORS = re.findall(r"^\| `(model\.\S+)` \| (\w+) \| \((\d+), (\d+)\) \|$", DOC, re.MULTILINE)
TERM_TENSORS = re.findall(
    r"^\| `([a-z_.]+)` \| (\w+) \| \(([\d, ]+)\) \|$", DOC.split("## Terms of a linear")[1], re.MULTILINE
)
E2M1_ROWS = re.findall(r"^\| (?:code|E2M1) \| (.*) \|$", DOC, re.MULTILINE)
KRONECKER = re.findall(r"^hadamard (\d+): (.*)$", DOC, re.MULTILINE)
TYPES = {
    torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int16: "I16",
}  # fmt: skip
WIDTHS = {"U8": 8, "F16": 16, "BF16": 16, "F32": 32, "I16": 16}


def bytes_row(text: str) -> torch.Tensor:
    return torch.tensor([list(bytes.fromhex(text))], dtype=torch.uint8)


def test_the_title_names_the_version() -> None:
    assert DOC.splitlines()[0] == f"# The packed checkpoint, version {FORMAT_VERSION}"


def test_the_examples_are_found() -> None:
    assert {bits for bits, _, _ in STREAMS} == {"2", "3", "4", "8"}
    assert {vector["scheme"]["zero_point"] for vector in VECTORS} == {"none", "integer", "real"}
    assert {vector["scheme"]["grid"] for vector in VECTORS} == {"uniform", "sign", "mxfp4"}
    assert {token["activation"]["grid"] for token in TOKENS} == {"uniform", "mxfp4"}
    assert {token["activation"]["zero_point"] for token in TOKENS} == {"none", "integer"}
    assert len(E2M1_ROWS) == 2
    assert {token["activation"].get("outliers", 0) > 0 for token in TOKENS} == {False, True}
    assert len(KRONECKER) == 6
    assert stored_shapes(PackedConfig.from_dict(WITH_HEAD_INPUT))["lm_head.mix.matrix"] == (40, 16)
    assert {spec["kind"] for spec in WITH_TERMS["modules"].values()} == {"linear"}
    kinds = {spec["kind"] for spec in CONFIG["modules"].values()}
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


@pytest.mark.parametrize(
    "config",
    [CONFIG, WITH_TERMS, WITH_CACHE, WITH_CENTER, WITH_HEAD_INPUT],
    ids=["linears", "terms", "cache", "center", "head input"],
)
def test_the_documented_config_is_read_and_written_back_the_same(config) -> None:
    assert PackedConfig.from_dict(config).to_dict() == config


def test_the_documented_numbers_of_mxfp4_are_those_of_the_code() -> None:
    codes, values = ([float(cell) for cell in row.split(" | ")] for row in E2M1_ROWS)
    assert codes == list(range(16))
    assert values == list(E2M1)
    scheme = Scheme.from_dict(json.loads(re.search(r"An mxfp4 grid is `(.*)` and", DOC)[1]))
    assert scheme == Scheme(4, 32, "none", "e8m0", "mxfp4")


def test_the_documented_keys_are_those_of_the_schemes_and_of_a_linear() -> None:
    keys = set(re.findall(r"^\| `(\w+)` \| ", DOC.split("**`activations`** gives")[1], re.MULTILINE))
    assert set(ActivationScheme(4).to_dict()) < keys
    assert set(WITH_TERMS["modules"][DOWN]) - {"kind", "rows", "ranges", "bias"} < keys
    for scheme in WITH_TERMS["activations"].values():
        assert set(scheme) == set(ActivationScheme(4).to_dict())


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: ActivationScheme.from_dict(token["activation"]).name)
def test_documented_tokens_have_the_documented_numbers(token) -> None:
    result = quantize(torch.tensor([token["token"]]), ActivationScheme.from_dict(token["activation"]))
    assert result.numbers.tolist() == [token["numbers"]]
    assert result.scales.tolist() == [token["scales"]]


def products(order: int, largest: int) -> list[list[int]]:
    """Every way to write the order as a product of documented factors, falling, none above `largest`."""
    if order == 1:
        return [[]]
    result = []
    for f in range(2, min(order, largest) + 1):
        q = f - 1
        known = f == 2 or (q % 4 == 3 and all(q % d for d in range(2, q)))
        if order % f == 0 and known:
            result += [[f, *rest] for rest in products(order // f, f)]
    return result


def as_documented(order: int) -> tuple[torch.Tensor, list[int]] | None:
    """`H(order)` built as the page says, and the factors of its Kronecker product from left to right."""
    ways = sorted(products(order, order))
    if not ways:
        return None
    least = min(sum(way) for way in ways)
    ways = [way for way in ways if sum(way) == least]
    factors = next(way for way in ways if len(way) == max(map(len, ways)))
    whole = torch.ones(1, 1, dtype=torch.float64)
    for f in reversed(factors):
        matrix = torch.ones(f, f, dtype=torch.float64)
        if f == 2:
            matrix[1, 1] = -1
        else:
            q = f - 1
            squares = {i * i % q for i in range(1, q)}
            matrix[1:, 0] = -1
            for i in range(1, f):
                for j in range(1, f):
                    matrix[i, j] = 1 if i == j or (i - j) % q in squares else -1
        whole = torch.kron(whole, matrix)
    return whole, factors[::-1]


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 28, 40, 64, 80, 92, 96, 144, 160, 224])
def test_the_documented_hadamard_matrices_are_those_of_the_code(order) -> None:
    actual, expected = hadamard(order), as_documented(order)
    assert (actual is None) == (expected is None)
    assert actual is None or torch.equal(actual, expected[0])


@pytest.mark.parametrize(("order", "product"), KRONECKER)
def test_documented_widths_have_the_documented_factors(order, product) -> None:
    expected = as_documented(int(order))
    assert product == ("none" if expected is None else " ".join(f"P({f})" for f in expected[1]))


def test_the_documented_small_matrices_are_those_of_the_code() -> None:
    for pattern, order in ((r"^H\(4\): (.*)$", 4), (r"^P\(12\), rows 0 to 2: (.*)$", 12)):
        rows = re.search(pattern, DOC, re.MULTILINE)[1].split(" / ")
        assert [[int(sign) for sign in row.split()] for row in rows] == hadamard(order)[: len(rows)].tolist()


def documented_linear() -> Linear:
    """The linear of the page, of its stored tensors."""
    config = {"quant_method": "subnibble", "format_version": FORMAT_VERSION, "modules": {"at": LINEAR["module"]}}
    config |= {"cache": None, "prefix": None}
    config |= {key: LINEAR[key] for key in ("schemes", "activations")}
    spec = PackedConfig.from_dict(config).modules["at"]
    stored = {}
    for name, part in spec.parts.items():
        rows, is_bytes = LINEAR["tensors"][name], part.dtype == torch.uint8
        stored[name] = torch.cat([bytes_row(row) for row in rows]) if is_bytes else torch.tensor(rows, dtype=part.dtype)
    assert LINEAR["tensors"].keys() == stored.keys()
    return linear_of(spec, stored)


def test_the_documented_linear_gives_the_documented_output() -> None:
    terms, x = documented_linear(), torch.tensor([LINEAR["x"]])
    assert torch.equal(linear(x, terms), torch.tensor([LINEAR["y"]]))
    c, g = terms.input.column_scale.float(), terms.input.gather.long()
    entered = (x * c)[:, g] @ as_documented(4)[0].float() / 2
    assert entered.tolist() == [LINEAR["after step 3"]]
    result = quantize(entered, terms.input.activation)
    assert result.numbers.tolist() == [LINEAR["numbers"]]
    assert result.scales.tolist() == [LINEAR["scales"]]
    # The example tells the terms apart.
    nothing = {"bias": None, "column_scale": None, "gather": None, "blocks": (), "activation": None, "low_rank": None,
               "requantized": 0}  # fmt: skip
    for name, value in nothing.items():
        assert not torch.equal(linear(x, changed(terms, **{name: value})), torch.tensor([LINEAR["y"]])), name


def test_the_documented_linear_with_terms_stores_the_documented_tensors() -> None:
    spec = PackedConfig.from_dict(WITH_TERMS).modules[DOWN]
    stored = {name: (TYPES[part.dtype], tuple(part.shape)) for name, part in spec.parts.items()}
    documented = {name: (kind, tuple(map(int, shape.split(", ")))) for name, kind, shape in TERM_TENSORS}
    assert stored == documented
    assert {name: shape for name, (_, shape) in documented.items()} == {
        name.removeprefix(f"{DOWN}."): shape for name, shape in stored_shapes(PackedConfig({DOWN: spec})).items()
    }


def test_the_documented_config_stores_the_documented_tensors() -> None:
    stored = []
    for path, spec in PackedConfig.from_dict(CONFIG).modules.items():
        parts = {name: part for name, part in spec.parts.items() if name != "bias"}
        stored += [(f"{path}.{name}", TYPES[part.dtype], *map(str, part.shape)) for name, part in parts.items()]
    assert stored == TENSORS


class ExampleSource:
    """A documented checkpoint, seen through its headers: shapes and widths by name, one weight file of 20000 bytes."""

    path = Path("example")

    def __init__(self, config: dict, tensors: dict[str, tuple[tuple[int, ...], int]]) -> None:
        shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        shape["tie_word_embeddings"] = False
        self.config = SimpleNamespace(model_type="llama", quantization_config=config, **shape)
        self.tensors = tensors

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
    specs = PackedConfig.from_dict(CONFIG).modules.values()
    linears = [spec.layout for spec in specs if isinstance(spec, PackedLinearSpec)]
    terms = re.search(r"take 64 \* \(([\d +]+)\) and 64 \* \(([\d +]+)\) bits", DOC).groups()
    documented = [64 * sum(map(int, term.split("+"))) for term in terms]
    assert documented == [layout.stored_bits for layout in linears]
    tensors = {name: ((int(rows), int(columns)), WIDTHS[kind]) for name, kind, rows, columns in TENSORS}
    biases = re.findall(r"`(\S+\.bias)` \((\d+)\)", DOC)
    size = measure(ExampleSource(CONFIG, tensors | {name: ((int(rows),), 32) for name, rows in biases}))
    assert size.activation_bits == 16
    assert f"these are {size.effective_bits:.3f} effective bits" in DOC
    # The table, both linears, and two biases.
    assert size.parameters == 100 * 64 + 64 * 64 + 64 * 72 + 64 + 64
    assert size.model_bits == 8 * 20000 / size.parameters


def test_the_documented_bits_of_the_example_with_terms_are_those_that_are_measured() -> None:
    packed = PackedConfig.from_dict(WITH_TERMS)
    names = stored_shapes(packed)
    widths = {f"{DOWN}.{name}": WIDTHS[kind] for name, kind, _ in TERM_TENSORS}
    size = measure(ExampleSource(WITH_TERMS, {name: (shape, widths.get(name, 8)) for name, shape in names.items()}))
    text = " ".join(DOC.split("Those of the example with terms take")[1].split("## Versions")[0].split())
    down, up = re.match(r"(.*) and (192 \* \([\d +]+\)) bits", text).groups()
    bits = [sum(math.prod(eval_sum(f) for f in term.split(" * ")) for term in split_sum(part)) for part in (down, up)]
    assert bits[0] == sum(math.prod(names[name]) * width for name, width in widths.items())
    assert sum(bits) / (64 * 192 + 192 * 64) == size.effective_bits
    assert f"these are {size.effective_bits:.3f} effective bits" in text
    assert f"over 192 + 64 channels {size.activation_bits:.3f} activation bits" in text
    assert size.activation_bits == ((768 + 40) + 2 * (128 + 20) + (32 + 20) + 1024) / (192 + 64)
    assert "(768 + 40) + 2 * (128 + 20) + (32 + 20) and 1024 bits" in text
    assert size.parameters == 64 * 192 + 192 * 64


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["bits"]))
def test_groups_of_a_cache_become_the_documented_codes(row) -> None:
    group = torch.tensor([row["group"]])
    result = quantize_rows(group, row["bits"], [(0, group.shape[1])], row["clip"])
    assert unpack_codes(result.codes, row["bits"], group.shape[1]).tolist() == [row["codes"]]
    assert (result.lows.tolist(), result.scales.tolist()) == ([[row["low"]]], [[row["scale"]]])


def test_the_documented_centre_is_stored_under_its_name() -> None:
    shapes = stored_shapes(PackedConfig.from_dict(WITH_CENTER))
    assert shapes == {"model.layers.0.self_attn.key_center.mean": (2, 16)}


def test_the_documented_prefix_has_the_documented_tensors() -> None:
    path = "model.layers.0.self_attn"
    shapes = stored_shapes(PackedConfig.from_dict(WITH_CACHE))
    assert shapes == {f"{path}.prefix.keys": (2, 3, 16), f"{path}.prefix.values": (2, 3, 16)}
    assert "`path.prefix.keys` and `path.prefix.values`, F16 (heads, tokens, width)" in DOC


def test_the_documented_bytes_of_a_cache_are_those_that_are_measured() -> None:
    prefix = {name: (shape, 16) for name, shape in stored_shapes(PackedConfig.from_dict(WITH_CACHE)).items()}
    source = ExampleSource(WITH_CACHE, {"model.layers.0.self_attn.q_proj.weight": ((64, 64), 16)} | prefix)
    # Two key-value heads of 16 channels: keys in groups of 2 tokens, values in groups of 2 channels.
    assert measure(source).cache_bytes == 2 * (16 * (1 + 4) / 2 + (6 + 8 * 4))
    assert measure(source).effective_bits == 16


def split_sum(text: str) -> list[str]:
    """Terms of a sum, sums in brackets kept whole."""
    return re.split(r" \+ (?![^(]*\))", text)


def eval_sum(text: str) -> int:
    return sum(int(number) for number in text.strip("()").split(" + "))
