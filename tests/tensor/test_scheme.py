"""A scheme says what it allows, where its groups lie and how many bits it takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnibble.errors import BadRecipe
from subnibble.tensor.activation_scheme import ACTIVATION_BITS, ActivationScheme
from subnibble.tensor.scheme import BITS, SCALE_TYPES, ZERO_POINTS, Scheme

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


MX = {"bits": 4, "group_size": 32, "zero_point": "none", "scale_type": "e8m0", "grid": "mxfp4"}


def test_an_mxfp4_grid_is_of_one_kind() -> None:
    scheme = Scheme(**MX)
    assert scheme.name == "mxfp4g32"
    assert (scheme.levels, scheme.scales_per_group) == (16, 1)
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    # 47 codes of 4 bits are 24 bytes; two scales of 8 bits.
    assert scheme.row_bits(47) == 24 * 8 + 16
    assert scheme.row_bits(64) / 64 == 4.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "found 3 bits, groups of 32, zero_point 'none', e8m0"),
        ({"bits": 8}, "found 8 bits"),
        ({"group_size": 16}, "groups of 16"),
        ({"group_size": -1}, "groups of -1"),
        ({"zero_point": "integer"}, "zero_point 'integer'"),
        ({"zero_point": "real"}, "zero_point 'real'"),
        ({"scale_type": "float16"}, "an mxfp4 grid has 4 bits, groups of 32, no zero-point and e8m0 scales"),
        ({"grid": "uniform"}, "scale_type is 'e8m0'; choose one of float16, bfloat16, float32"),
        ({"grid": "sign"}, "scale_type is 'e8m0'"),
        ({"grid": "mxfp8"}, "scale_type is 'e8m0'"),
        ({"grid": "mxfp8", "scale_type": "float16"}, "grid is 'mxfp8'; choose one of uniform, sign, mxfp4"),
    ],
)
def test_an_mxfp4_grid_of_another_kind_is_an_error_that_says_what_it_has_to_be(change, message) -> None:
    with pytest.raises(BadRecipe, match=message):
        Scheme(**{**MX, **change})


activations = st.one_of(
    st.just(ActivationScheme(4, 32, "none", "mxfp4")),
    st.builds(
        ActivationScheme,
        bits=st.sampled_from(ACTIVATION_BITS),
        group_size=st.one_of(st.just(-1), st.integers(1, 300)),
        zero_point=st.sampled_from(["none", "integer"]),
        clip=st.one_of(st.just(1.0), st.floats(0, 1, exclude_min=True)),
    ),
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 2}, "activation bits are 2; choose one of 3, 4, 8"),
        ({"bits": 16}, "activation bits are 16"),
        ({"bits": True}, "activation bits are True"),
        ({"bits": 4.0}, "activation bits are 4.0"),
        ({"bits": "4"}, "activation bits are '4'"),
        ({"bits": None}, "activation bits are None"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"bits": 4, "group_size": -2}, "group_size is -2"),
        ({"bits": 4, "group_size": True}, "group_size is True"),
        ({"bits": 4, "group_size": 32.0}, "group_size is 32.0"),
        ({"bits": 4, "group_size": None}, "group_size is None"),
        ({"bits": 4, "grid": "sign"}, "grid is 'sign'; choose one of uniform, mxfp4"),
        ({"bits": 4, "grid": ["uniform"]}, "grid is"),
        ({"bits": 4, "zero_point": "real"}, "zero_point is 'real'; choose one of none, integer"),
        ({"bits": 4, "zero_point": None}, "zero_point is None"),
        ({"bits": 4, "clip": 0}, "clip is 0"),
        ({"bits": 4, "clip": -0.5}, "clip is -0.5"),
        ({"bits": 4, "clip": 1.01}, "clip is 1.01"),
        ({"bits": 4, "clip": float("nan")}, "clip is nan"),
        ({"bits": 4, "clip": True}, "clip is True"),
        ({"bits": 4, "clip": "1"}, "clip is '1'"),
        ({"bits": 4, "clip": None}, "clip is None"),
        ({"bits": 8, "group_size": 32, "zero_point": "none", "grid": "mxfp4"}, "mxfp4 activations have 4 bits"),
        ({"bits": 4, "group_size": 16, "zero_point": "none", "grid": "mxfp4"}, "found 4 bits, groups of 16"),
        ({"bits": 4, "group_size": 32, "grid": "mxfp4"}, "zero_point 'integer'"),
        ({"bits": 4, "group_size": 32, "zero_point": "none", "grid": "mxfp4", "clip": 0.9}, "clip 0.9"),
    ],
)
def test_an_invalid_value_of_an_activation_scheme_is_an_error_that_names_it(values, message) -> None:
    with pytest.raises(BadRecipe, match=message):
        ActivationScheme(**values)
    with pytest.raises(BadRecipe, match=message):
        ActivationScheme.from_dict(values)


def test_an_unknown_key_of_an_activation_scheme_is_an_error_that_names_it() -> None:
    with pytest.raises(BadRecipe, match="unknown activation scheme key 'scale_type'; known: bits, clip, grid"):
        ActivationScheme.from_dict({"bits": 4, "scale_type": "e8m0"})


@given(activations)
@settings(deadline=None)
def test_an_activation_scheme_survives_its_dictionary(scheme) -> None:
    assert ActivationScheme.from_dict(scheme.to_dict()) == scheme


@given(activations, activations)
@settings(deadline=None)
def test_names_are_equal_only_for_equal_activation_schemes(one, other) -> None:
    assert (one.name == other.name) == (one == other)


@pytest.mark.parametrize("clips", [(0.9, 0.9000001), (0.1234567, 0.1234568), (1 - 1e-9, 1.0)])
def test_a_clip_is_named_to_its_last_digit(clips) -> None:
    one, other = (ActivationScheme(4, clip=clip) for clip in clips)
    assert one.name != other.name


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (ActivationScheme(8), "a8token"),
        (ActivationScheme(4, 128), "a4g128"),
        (ActivationScheme(4, 128, "none"), "a4g128-sym"),
        (ActivationScheme(3, -1, "none", clip=0.9), "a3token-sym-clip0.9"),
        (ActivationScheme(4, 32, "none", "mxfp4"), "amxfp4g32"),
    ],
)
def test_names_of_activation_schemes_are_short_and_stable(scheme, name) -> None:
    assert scheme.name == name


@pytest.mark.parametrize(
    ("scheme", "channels", "bits"),
    [
        # A scale of 16 bits and a zero-point as wide as a code for each group.
        (ActivationScheme(8), 576, 8 * 576 + 16 + 8),
        (ActivationScheme(8, -1, "none"), 576, 8 * 576 + 16),
        (ActivationScheme(4, 128), 576, 4 * 576 + 5 * (16 + 4)),
        (ActivationScheme(3, 3), 5, 15 + 2 * (16 + 3)),
        (ActivationScheme(3, 128, "none"), 5, 15 + 16),
        # MXFP4: a scale of 8 bits for 32 numbers.
        (ActivationScheme(4, 32, "none", "mxfp4"), 64, 4 * 64 + 2 * 8),
        (ActivationScheme(4, 32, "none", "mxfp4"), 65, 4 * 65 + 3 * 8),
    ],
)
def test_token_bits_count_codes_scales_and_zero_points(scheme, channels, bits) -> None:
    assert scheme.token_bits(channels) == bits


def test_groups_of_a_token_lie_as_those_of_a_row() -> None:
    for group_size in (-1, 1, 3, 5, 8, 128):
        for channels in (1, 5, 6, 139):
            bounds = ActivationScheme(4, group_size).group_bounds(channels)
            assert bounds == Scheme(4, group_size).group_bounds(channels)
