"""What an spec stores: names, shapes and types of its tensors, and the bits of a token that enters it."""

from dataclasses import dataclass, replace
from typing import Annotated

import pytest
import torch
from packed_config_samples import (
    A4,
    A8,
    AMX,
    CONFIG,
    DOWN,
    HEAD,
    NORM,
    ONE_TERM,
    SCALED,
    SHARED,
    W3,
    W8,
    WHOLE,
    K,
    Q,
    through_json,
)

from subnibble.checkpoint.json_forms import FLAG
from subnibble.checkpoint.manifest import PackedConfig, stored_shapes
from subnibble.checkpoint.module_specs import (
    PackedLinearSpec,
    Stored,
    Term,
    gather_type,
    linear_of,
    linear_spec,
    linear_state,
)
from subnibble.errors import CheckpointError
from subnibble.tensor.packed import PackedLayout


def test_a_scaled_linear_stores_one_float16_number_an_input_column() -> None:
    plain, scaled = stored_shapes(CONFIG), stored_shapes(SCALED)
    assert scaled == plain | {f"{DOWN}.column_scale": (192,)}
    assert plain[f"{Q}.bias"] == (64,)
    assert plain[f"{NORM}.bias"] == (64,)
    assert not any(name.startswith(HEAD) for name in plain)
    two = PackedConfig({Q: PackedLinearSpec(PackedLayout(64, ((48, W3), (16, W8))), True, True)})
    assert stored_shapes(two)[f"{Q}.column_scale"] == (64,)
    assert {"codes", "scales", "zeros", "codes_1", "scales_1", "bias", "column_scale"} == {
        name.removeprefix(f"{Q}.") for name in stored_shapes(two)
    }


def test_a_composed_linear_stores_the_tensors_of_all_its_matrices() -> None:
    shapes = {
        name.removeprefix(f"{DOWN}."): shape for name, shape in stored_shapes(PackedConfig({DOWN: WHOLE})).items()
    }
    assert shapes == {
        "codes": (64, 48),
        "scales": (64, 1),
        "zeros": (64, 1),
        "codes_1": (64, 64),
        "scales_1": (64, 1),
        "bias": (64,),
        "column_scale": (192,),
        "gather": (192,),
        "salient.codes": (64, 16),
        "salient.scales": (64, 1),
        "down.codes": (8, 192),
        "down.scales": (8, 1),
        "up.codes": (64, 8),
        "up.scales": (64, 1),
    }


@pytest.mark.parametrize(("columns", "stored"), [(1, torch.int16), (32767, torch.int16), (32768, torch.int32)])
def test_a_gather_is_stored_in_16_bits_where_that_holds_its_channels(columns, stored) -> None:
    assert gather_type(columns) == stored


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        ({}, 16 * 192),
        # 192 codes of 8 bits, one scale of 16, one zero-point of 8.
        ({"activation": A8}, 192 * 8 + 24),
        # 16 extra columns repeat codes, scale and zero-point; a residual repeats them once more.
        ({"activation": A8, **ONE_TERM["salient"]}, 192 * 8 + 24 + 16 * 8 + 24),
        ({"activation": A8, **ONE_TERM["salient"], "requantized": 16}, 192 * 8 + 24 + 2 * (16 * 8 + 24)),
        ({"activation": A8, **ONE_TERM["low_rank"]}, 192 * 8 + 24 + 4 * 8 + 24),
        # 64 outliers are a group of 8 bits with a scale; there are none between the factors.
        ({"activation": replace(A4, outliers=64), **ONE_TERM["low_rank"]}, 128 * 4 + 20 + 64 * 8 + 16 + 4 * 4 + 20),
        # 6 groups of 32 with a scale of 8 bits.
        ({"activation": AMX}, 192 * 4 + 6 * 8),
        (ONE_TERM["salient"], 16 * 192),
    ],
)
def test_bits_of_a_token_count_extra_columns_and_the_low_rank_input(change, bits) -> None:
    plain = CONFIG.modules[DOWN]
    assert PackedLinearSpec(plain.layout, False, **change).token_bits() == bits


@pytest.mark.parametrize("spec", [WHOLE, CONFIG.modules[DOWN], CONFIG.modules[Q]], ids=["whole", "plain", "two ranges"])
def test_a_linear_is_stored_and_rebuilt_by_the_same_table(spec: PackedLinearSpec) -> None:
    parts = spec.parts
    terms = linear_of(spec, parts)
    assert linear_spec(terms) == spec
    assert {name: (part.dtype, part.shape) for name, part in linear_state(terms).items()} == {
        name: (part.dtype, part.shape) for name, part in parts.items()
    }
    assert spec.stored_bits == 8 * sum(part.nbytes for name, part in parts.items() if name != "bias")


def test_a_linear_that_enters_as_another_stores_nothing_of_its_input() -> None:
    values = through_json(SHARED)["modules"]
    assert values[K] == {"kind": "linear", "rows": 32, "ranges": [[64, W8.name]], "bias": False, "input": Q}
    assert {"column_scale", "gather", "hadamard", "activation"} < values[Q].keys()
    assert {f"{Q}.gather", f"{Q}.column_scale"} < stored_shapes(SHARED).keys()
    assert set(stored_shapes(SHARED)) & {f"{K}.gather", f"{K}.column_scale"} == set()
    read = PackedConfig.from_dict(through_json(SHARED))
    assert read == SHARED
    assert read.modules[K].token_bits() == read.modules[Q].token_bits()


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (K, {"input": "model.layers.0.self_attn.v_proj"}),
        (K, {"input": K}),
        (K, {"input": 3}),
        (K, {"ranges": [[32, W8.name]]}),
        (K, {"gather": True}),
        (K, {"activation": A4.name}),
        (Q, {"input": K}),
        (K, {"input": None}),
    ],
)
def test_an_input_of_no_linear_that_enters_alike_is_refused(path: str, changes: dict) -> None:
    values = through_json(SHARED)
    values["modules"][path] |= changes
    with pytest.raises(CheckpointError, match="damaged"):
        PackedConfig.from_dict(values)


@dataclass(frozen=True)
class Extended(PackedLinearSpec):
    """A linear with one term more, which takes one row."""

    codebook: Annotated[bool, Term(FLAG, ("table",), Stored(torch.float16, lambda spec: (16, 2)))] = False


def test_a_term_more_is_one_row_more() -> None:
    plain, more = (Extended(WHOLE.layout, True, codebook=codebook) for codebook in (False, True))
    assert more.to_dict() == {**plain.to_dict(), "table": True}
    assert plain.to_dict() == PackedLinearSpec(WHOLE.layout, True).to_dict()
    assert more.parts.keys() - plain.parts.keys() == {"codebook"}
    assert more.parts["codebook"].shape == (16, 2)
    assert more.stored_bits - plain.stored_bits == 16 * 32
