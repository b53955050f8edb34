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
