"""Types of the C++ module. Tensors are passed as addresses; number types as the values of `Number` in cpp/matrix.h."""

class Form:
    def __init__(
        self, isa: str, rows: int, columns: int, group: int, bits: int, grid: int, scale_type: int, integer_zeros: bool
    ) -> None: ...

def instruction_sets() -> list[str]: ...

class Input:
    """Tokens as whole numbers."""

    @property
    def count(self) -> int: ...
    @property
    def columns(self) -> int: ...

class Scheme:
    """How tokens are rounded. kind: as `Rounding::Kind` in cpp/tiles.h. planes: bytes of a number, 1 to 3."""

    def __init__(self, isa: str, kind: int, last: int, clip: float, group: int, outliers: int, planes: int) -> None: ...
    def round(self, x: int, x_type: int, tokens: int, columns: int, x_stride: int, /) -> Input: ...
    def rest(self, rounded: Input, x: int, x_type: int, x_stride: int, columns: int, /) -> Input: ...

class Weight:
    """A packed matrix, repacked into tiles."""

    def __init__(self, form: Form, codes: int, scales: int, zeros: int, /) -> None: ...
    def multiply(self, x: Input, start: int, y: int, y_stride: int, add: bool, /) -> None: ...
    @property
    def nbytes(self) -> int: ...

def dequantize(
    form: Form,
    codes: int,
    scales: int,
    zeros: int,
    first: int,
    last: int,
    out: int,
    out_type: int,
    out_stride: int,
    /,
) -> None: ...

# ---- the decoder step ----

# (order, number of blocks, [(order of a factor, address of its matrix)]) of adjacent blocks of one order.
_Runs = list[tuple[int, int, list[tuple[int, int]]]]
# (address of the gain or 0, address of the bias or 0, eps)
_Norm = tuple[int, int, float]

class Terms:
    """A linear, term by term. Number types of dense matrices as `Number` in cpp/matrix.h."""

    def __init__(self, rows: int) -> None: ...
    def main(self, weight: Weight, start: int, /) -> None: ...
    def salient(self, weight: Weight, start: int, /) -> None: ...
    def down(self, weight: Weight, start: int, /) -> None: ...
    def up(self, weight: Weight, start: int, /) -> None: ...
    def inner(self, scheme: Scheme, /) -> None: ...
    def bias(self, address: int, /) -> None: ...
    def dense(self, address: int, dtype: int, /) -> None: ...

class Site:
    """Steps on a tensor, and the linears that read the result."""

    def __init__(
        self, width: int, column_scale: int, gather: int, blocks: _Runs, scheme: Scheme, requantized: int
    ) -> None: ...
    def reader(self, terms: Terms, /) -> None: ...

class Layer:
    """A decoder block. places: (site, reader) of query, key, value, gate and up."""

    attention_norm: _Norm
    mlp_norm: _Norm
    query_norm: _Norm
    key_norm: _Norm
    attention_in: list[Site]
    attention_out: list[Site]
    mlp_in: list[Site]
    mlp_hidden: list[Site]
    places: list[tuple[int, int]]
    window: int
    key_center: int

class Cache:
    """How keys and values are stored."""

    def __init__(
        self, heads: int, width: int, bits: int, group: int, by_channel: bool, window: int, clip: float,
        before_rope: bool,
    ) -> None: ...  # fmt: skip

class Table:
    """An embedding."""

    def __init__(self, rows: int, width: int) -> None: ...
    def packed(self, form: Form, codes: int, scales: int, zeros: int, /) -> None: ...
    def dense(self, address: int, dtype: int, /) -> None: ...

class Sequence:
    """Keys and values of one sequence in all layers."""

    @property
    def length(self) -> int: ...
    def crop(self, length: int, /) -> bool: ...
    def reserve(self, tokens: int, /) -> None: ...
    def advance(self, tokens: int, /) -> None: ...
    def coded(self, layer: int, of_keys: bool, /) -> int: ...
    def place_angles(self, cos: int, sin: int, tokens: int, count: int, /) -> None: ...
    def read(self, layer: int, of_keys: bool, codes: int, scales: int, lows: int, exact: int, /) -> None: ...
    def write(self, layer: int, of_keys: bool, codes: int, scales: int, lows: int, exact: int, /) -> None: ...

class Attention:
    """Attention of one layer alone, for tests."""

    def __init__(self, isa: str, cache: Cache, query_heads: int, angles: int, window: int) -> None: ...
    def open(self) -> Sequence: ...
    def append(
        self, sequence: Sequence, tokens: int, q: int, k: int, v: int, cos: int, sin: int, center: int, out: int, /
    ) -> None: ...

class Decoder:
    """A whole model. gate: as `Gate` in cpp/step/functions.h."""

    def __init__(
        self, isa: str, width: int, query_heads: int, angles: int, scaling: float, gate: int, cache: Cache,
        head_rotation: _Runs, prefix_tokens: int, table: Table, layers: list[Layer], final_norm: _Norm, head: Site,
    ) -> None: ...  # fmt: skip
    def set_head_input(self, matrix: int, widths: list[int], /) -> None: ...
    def set_angles(self, cos: int, sin: int, positions: int, /) -> None: ...
    def set_prefix(self, layer: int, keys: int, values: int, /) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def open(self) -> Sequence: ...
    def forward(self, appends: list[tuple[Sequence, list[int], bool]], threads: int, logits: int, /) -> None: ...
