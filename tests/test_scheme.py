"""A scheme says what it allows, where its groups lie and how many bits it takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnibble.errors import BadRecipe
from subnibble.scheme import BITS, SCALE_TYPES, ZERO_POINTS, Scheme

schemes = st.builds(
    Scheme,
    bits=st.sampled_from(BITS),
    group_size=st.one_of(st.just(-1), st.integers(1, 300)),
    zero_point=st.sampled_from(ZERO_POINTS),
    scale_type=st.sampled_from(sorted(SCALE_TYPES)),
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": 0}, "bits is 0"),
        ({"bits": 16}, "bits is 16"),
        ({"bits": True}, "bits is True"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"bits": None}, "bits is None"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"bits": 4, "group_size": -2}, "group_size is -2"),
        ({"bits": 4, "group_size": 128.0}, "group_size is 128.0"),
        ({"bits": 4, "group_size": True}, "group_size is True"),
        ({"bits": 4, "group_size": "128"}, "group_size is '128'"),
        ({"bits": 4, "zero_point": "int"}, "zero_point is 'int'"),
        ({"bits": 4, "zero_point": None}, "zero_point is None"),
        ({"bits": 4, "scale_type": "float64"}, "scale_type is 'float64'"),
        ({"bits": 4, "scale_type": 16}, "scale_type is 16"),
    ],
)
def test_an_invalid_value_is_an_error_that_names_it(values, message) -> None:
    with pytest.raises(BadRecipe, match=message):
        Scheme(**values)
    with pytest.raises(BadRecipe, match=message):
        Scheme.from_dict(values)


def test_an_unknown_key_is_an_error_that_names_it() -> None:
    with pytest.raises(BadRecipe, match="unknown scheme key 'groups'"):
        Scheme.from_dict({"bits": 4, "groups": 128})


@given(schemes)
@settings(deadline=None)
def test_a_scheme_survives_its_dictionary(scheme) -> None:
    assert Scheme.from_dict(scheme.to_dict()) == scheme


@given(schemes, schemes)
@settings(deadline=None)
def test_names_are_equal_only_for_equal_schemes(one, other) -> None:
    assert (one.name == other.name) == (one == other)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(3), "w3g128"),
        (Scheme(4, -1, "none"), "w4channel-sym"),
        (Scheme(2, 32, "real", "bfloat16"), "w2g32-real-bfloat16"),
    ],
)
def test_names_are_short_and_stable(scheme, name) -> None:
    assert scheme.name == name


@pytest.mark.parametrize(
    ("columns", "group_size", "bounds"),
    [
        (576, 128, [(0, 128), (128, 256), (256, 384), (384, 512), (512, 576)]),
        (5, 3, [(0, 3), (3, 5)]),
        (6, 3, [(0, 3), (3, 6)]),
        (5, 8, [(0, 5)]),
        (7, -1, [(0, 7)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_groups_lie_where_expected(columns, group_size, bounds) -> None:
    scheme = Scheme(4, group_size)
    assert scheme.group_bounds(columns) == bounds
    assert scheme.groups(columns) == len(bounds)


@given(schemes, st.integers(1, 1000))
@settings(deadline=None)
def test_groups_cover_the_row_once_and_only_the_last_is_short(scheme, columns) -> None:
    bounds = scheme.group_bounds(columns)
    assert [column for start, stop in bounds for column in range(start, stop)] == list(range(columns))
    widths = [stop - start for start, stop in bounds]
    full = columns if scheme.group_size == -1 else scheme.group_size
    assert all(width == full for width in widths[:-1])
    assert 1 <= widths[-1] <= full


@pytest.mark.parametrize(
    ("scheme", "columns", "bits"),
    [
        # 576 codes of 3 bits are 216 bytes; 5 scales of 16 bits; 5 zeros of 3 bits are 15 bits, so 2 bytes.
        (Scheme(3, 128, "integer"), 576, 216 * 8 + 80 + 16),
        (Scheme(3, 128, "none"), 576, 216 * 8 + 80),
        (Scheme(3, 128, "real"), 576, 216 * 8 + 80 + 80),
        (Scheme(3, 128, "real", "float32"), 576, 216 * 8 + 160 + 160),
        # 5 codes of 3 bits take 2 bytes, 2 zeros one byte.
        (Scheme(3, 3, "integer", "bfloat16"), 5, 16 + 32 + 8),
        (Scheme(2, -1, "integer"), 4, 8 + 16 + 8),
        (Scheme(8, 2, "integer", "float32"), 5, 40 + 96 + 24),
    ],
)
def test_row_bits_count_codes_scales_zeros_and_padding(scheme, columns, bits) -> None:
    assert scheme.row_bits(columns) == bits


def test_a_group_wider_than_the_row_is_an_error_that_names_the_linear() -> None:
    Scheme(4, 64).check_width(64, "down_proj")
    Scheme(4, -1).check_width(1, "down_proj")
    with pytest.raises(BadRecipe, match="group 65 is larger than the 64 inputs of down_proj"):
        Scheme(4, 65).check_width(64, "down_proj")


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_number_of_codes(bits) -> None:
    assert Scheme(bits).levels == {2: 4, 3: 8, 4: 16, 8: 256}[bits]
