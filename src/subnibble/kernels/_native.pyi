"""Types of the C++ module. Tensors are passed as addresses; number types as the values of `Number` in cpp/matrix.h."""

class Form:
    def __init__(
        self, isa: str, rows: int, columns: int, group: int, bits: int, grid: int, scale_type: int, integer_zeros: bool
    ) -> None: ...

def instruction_sets() -> list[str]: ...
def multiply(
    form: Form,
    codes: int,
    scales: int,
    zeros: int,
    x: int,
    x_type: int,
    tokens: int,
    x_stride: int,
    y: int,
    y_stride: int,
    add: bool,
    /,
) -> None: ...
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
