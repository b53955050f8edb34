"""A recipe rejects what it does not know, round-trips through TOML, and resolves overrides in order."""

import tomllib
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnibble.errors import BadRecipe
from subnibble.methods import METHODS
from subnibble.recipe import EMBEDDING_BITS, Recipe
from subnibble.recipe.overrides import matches
from subnibble.tensor.activation_scheme import ACTIVATION_BITS, ActivationScheme
from subnibble.tensor.scheme import BITS, SCALE_TYPES, ZERO_POINTS, Scheme

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.11.mlp.down_proj"

# No surrogates: they are not text that a file can hold.
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
integers = st.integers(-(2**63), 2**63 - 1)
group_sizes = st.one_of(st.just(-1), st.integers(1, 4096))
values = st.one_of(text, integers, st.booleans(), st.floats(allow_nan=False))
options = st.dictionaries(text, st.one_of(values, st.lists(integers, max_size=3)), max_size=4)
zero_points = st.sampled_from(["auto", *ZERO_POINTS])
shared = {"group_size": group_sizes, "zero_point": zero_points, "skip": st.booleans()}
override = st.one_of(
    st.fixed_dictionaries(
        {}, optional={"bits": st.sampled_from(BITS), "grid": st.sampled_from(["auto", "uniform"]), **shared}
    ),
    st.fixed_dictionaries(
        {"grid": st.just("sign"), "bits": st.sampled_from([2, 3, 4])},
        optional=shared | {"zero_point": st.sampled_from(["auto", "none"])},
    ),
)
paths = text.filter(lambda pattern: not pattern.startswith("re:"))
patterns = st.one_of(paths, st.sampled_from(["re:.*", r"re:a\.b$", "re:"]))
recipes = st.builds(
    Recipe,
    method=text,
    bits=st.sampled_from(BITS),
    group_size=group_sizes,
    zero_point=zero_points,
    grid=st.sampled_from(["auto", "uniform"]),
    scale_type=st.sampled_from(sorted(SCALE_TYPES)),
    embedding_bits=st.sampled_from(EMBEDDING_BITS),
    activation_bits=st.sampled_from([*ACTIVATION_BITS, 16]),
    activation_group_size=st.one_of(st.none(), group_sizes),
    activation_zero_point=st.sampled_from(["none", "integer"]),
    activation_clip=st.floats(0.01, 1.0),
    calibration=st.one_of(st.none(), text),
    num_windows=st.integers(1, 10**6),
    window=st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    device=text,
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    options=options,
    overrides=st.dictionaries(patterns, override, max_size=4),
)


@given(recipes)
@settings(deadline=None)
def test_a_recipe_survives_its_dictionary(recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@given(recipe=recipes)
@settings(deadline=None)
def test_a_recipe_survives_its_toml_file_with_the_order_of_overrides(tmp_path_factory, recipe) -> None:
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    read = Recipe.from_toml(file)
    assert read == recipe
    # Equal dictionaries may differ in order, and the first override that matches holds.
    assert list(read.overrides) == list(recipe.overrides)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation_zero_point": "bogus"}, "zero_point is 'bogus'"),
        ({"activation_clip": 7.0}, "clip is 7"),
        ({"activation_group_size": -5}, "group_size is -5"),
        ({"activation_group_size": 0}, "group_size is 0"),
        ({"activation_zero_point": "bogus", "grid": "mxfp4", "group_size": 32, "activation_bits": 4}, "'bogus'"),
    ],
)
def test_settings_of_inputs_are_checked_though_nothing_uses_them(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        Recipe(**wrong)


@pytest.mark.parametrize("grid", ["sign", "mxfp4"])
def test_a_zero_point_that_nothing_would_have_is_refused(grid) -> None:
    with pytest.raises(BadRecipe, match=f"zero_point is 'real', but no {grid} grid has a zero-point; set"):
        Recipe(grid=grid, group_size=32, zero_point="real")
    with pytest.raises(BadRecipe, match=f"no {grid} grid has a zero-point"):
        Recipe(grid=grid, group_size=32, zero_point="real", overrides={Q: {"grid": grid, "group_size": 32}})
    assert Recipe(grid=grid, group_size=32, zero_point="none").zero_point == "none"
    assert Recipe(grid=grid, group_size=32, zero_point="real", overrides={Q: {"grid": "uniform"}}).grid == grid


def test_a_recipe_of_a_sign_grid_survives_both() -> None:
    recipe = Recipe(bits=2, grid="sign", zero_point="real", overrides={Q: {"grid": "uniform", "bits": 8}})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_unset_keys_are_left_out_of_the_dictionary() -> None:
    assert "calibration" not in Recipe().to_dict()
    assert Recipe(calibration="c4").to_dict()["calibration"] == "c4"


def test_an_unknown_key_is_an_error_that_names_it(tmp_path) -> None:
    with pytest.raises(BadRecipe, match="unknown recipe key 'bit'"):
        Recipe.from_dict({"bit": 4})
    file = tmp_path / "recipe.toml"
    file.write_text("bits = 4\nbit = 4\n")
    with pytest.raises(BadRecipe, match="unknown recipe key 'bit'"):
        Recipe.from_toml(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", 3),
        ("bits", True),
        ("bits", "4"),
        ("bits", 4.0),
        ("group_size", True),
        ("group_size", 128.0),
        ("zero_point", 1),
        ("scale_type", 16),
        ("grid", 1),
        ("grid", None),
        ("embedding_bits", True),
        ("embedding_bits", 8.0),
        ("activation_bits", True),
        ("activation_bits", 4.0),
        ("activation_group_size", "128"),
        ("activation_zero_point", None),
        ("activation_clip", "1"),
        ("activation_clip", True),
        ("calibration", 5),
        ("num_windows", True),
        ("num_windows", 1.5),
        ("window", "2048"),
        ("seed", False),
        ("seed", 0.0),
        ("device", 0),
        ("dtype", None),
        ("options", ["damping"]),
        ("overrides", "re:.*"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_its_key(key, value) -> None:
    with pytest.raises(BadRecipe, match=rf"^{key} is .*expected"):
        Recipe.from_dict({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 5),
        ("group_size", 0),
        ("zero_point", "integral"),
        ("scale_type", "float8"),
        ("grid", "lattice"),
        ("grid", "Auto"),
        ("embedding_bits", 2),
        ("num_windows", 0),
        ("window", -1),
        ("dtype", "float64"),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_its_key(key, value) -> None:
    with pytest.raises(BadRecipe, match=f"^{key} is "):
        Recipe(**{key: value})


@pytest.mark.parametrize("content", [b"bits = ", b"bits = 4\nbits = 3\n", b"a = " + 9999 * b"["])
def test_a_file_that_is_no_toml_is_an_error_that_names_the_file(tmp_path, content) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(BadRecipe, match=r"mine\.toml is no valid TOML"):
        Recipe.from_toml(file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_recipe_reads_the_same_in_every_encoding_that_says_which_it_is(tmp_path, encoding, end) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(f'bits = 3{end}system_prompt = "Grüße"{end}'.encode(encoding))
    assert Recipe.from_toml(file) == Recipe(bits=3, system_prompt="Grüße")


def test_a_recipe_in_another_encoding_is_an_error_that_says_where(tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes('bits = 3\nsystem_prompt = "Grüße"\n'.encode("latin-1"))
    with pytest.raises(BadRecipe, match=r"mine\.toml is not UTF-8 text .*line 2\); save it as UTF-8"):
        Recipe.from_toml(file)


@pytest.mark.parametrize(
    "values",
    [
        {"calibration": "caf\udce9.txt"},
        {"system_prompt": "cut in two \ud83d"},
        {"options": {"order": "\udce9"}},
        {"options": {"order": None}},
        {"options": {1: 2}},
        {"options": {"order": object()}},
    ],
)
def test_what_no_recipe_file_could_hold_is_an_error_when_the_recipe_is_built(values) -> None:
    with pytest.raises(BadRecipe, match=f"^{next(iter(values))}"):
        Recipe(**values)


def test_a_missing_file_is_an_error_that_names_the_file(tmp_path) -> None:
    with pytest.raises(BadRecipe, match=r"none\.toml cannot be read"):
        Recipe.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("pattern", "path", "holds"),
    [
        (Q, Q, True),
        ("model.layers.0", Q, False),
        ("self_attn.q_proj", Q, False),
        ("model.layers.0.self_attn.q_proj.", Q, False),
        # Not a regular expression: its dots match dots alone.
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn-q_proj", False),
        ("re:model.layers.0", Q, True),
        ("re:self_attn", Q, False),
        (r"re:.*\.q_proj", Q, True),
        (r"re:.*\.q_proj$", Q + ".lora", False),
        ("re:", Q, True),
    ],
)
def test_patterns_are_exact_paths_or_expressions_matched_from_the_start(pattern, path, holds) -> None:
    assert matches(pattern, path) is holds


def test_the_first_override_that_matches_holds() -> None:
    down, layer = {"bits": 8}, {"group_size": 32}
    first = Recipe(bits=3, overrides={DOWN: down, r"re:model\.layers\.11\.": layer})
    second = Recipe(bits=3, overrides={r"re:model\.layers\.11\.": layer, DOWN: down})
    assert first.scheme_of(DOWN) == Scheme(8, 128)
    assert second.scheme_of(DOWN) == Scheme(3, 32)
    assert first.scheme_of(Q) == second.scheme_of(Q) == Scheme(3, 128)


def test_an_override_keeps_what_it_does_not_set() -> None:
    overrides = {Q: {"bits": 4}, DOWN: {}}
    recipe = Recipe(bits=3, group_size=64, zero_point="real", scale_type="bfloat16", overrides=overrides)
    assert recipe.scheme_of(Q) == Scheme(4, 64, "real", "bfloat16")
    assert recipe.scheme_of(DOWN) == recipe.scheme


def test_a_skipped_linear_has_no_scheme() -> None:
    recipe = Recipe(overrides={Q: {"skip": True}, DOWN: {"skip": False, "bits": 2}})
    assert recipe.scheme_of(Q) is None
    assert recipe.scheme_of(DOWN) == Scheme(2)


def test_a_pattern_that_matches_no_linear_is_an_error_that_names_it() -> None:
    Recipe(overrides={Q: {}, r"re:.*down_proj": {}}).check_overrides([Q, DOWN])
    with pytest.raises(BadRecipe, match="override 're:lm_head' matches no linear; they have names like"):
        Recipe(overrides={Q: {}, "re:lm_head": {"bits": 8}}).check_overrides([Q, DOWN])


@pytest.mark.parametrize(
    ("pattern", "values", "message"),
    [
        ("re:(", {"bits": 4}, "is not a regular expression"),
        ("re:(", {"skip": True}, "is not a regular expression"),
        ("re:a{99999999999999999999}", {"bits": 4}, "is not a regular expression"),
        (Q, {"bit": 4}, "unknown key 'bit'"),
        (
            Q,
            {"scale_type": "float32"},
            "unknown key 'scale_type'; known: bits, group_size, grid, zero_point, activation_bits, skip",
        ),
        (Q, {"zero_point": "half"}, "zero_point is 'half'"),
        (Q, {"zero_point": 0}, "zero_point is 0"),
        (Q, {"grid": "lattice"}, "grid is 'lattice'"),
        (Q, {"grid": None}, "grid is None"),
        (Q, {"grid": "sign", "bits": 8}, "a sign grid has at most 4 bits"),
        (Q, {"grid": "sign", "bits": 2, "zero_point": "real"}, "a sign grid has no zero-point"),
        (Q, 4, "give a table"),
        (Q, {"skip": 1}, "skip is 1"),
        (Q, {"skip": "yes"}, "skip is 'yes'"),
        (Q, {"bits": 5}, "bits is 5"),
        (Q, {"bits": True}, "bits is True"),
        (Q, {"bits": 4.0}, "bits is 4.0"),
        (Q, {"bits": "4"}, "bits is '4'"),
        (Q, {"group_size": 0}, "group_size is 0"),
        (Q, {"group_size": 64.0}, "group_size is 64.0"),
        (Q, {"skip": True, "bits": 5}, "bits is 5"),
        (Q, {"activation_bits": 5}, "activation bits are 5"),
        (Q, {"grid": "mxfp4"}, "set bits = 4, group_size = 32"),
        (Q, {"grid": "mxfp4", "group_size": 32, "zero_point": "real"}, "a mxfp4 grid has no zero-point"),
    ],
)
def test_an_invalid_override_is_an_error_when_the_recipe_is_built(pattern, values, message) -> None:
    with pytest.raises(BadRecipe, match=message):
        Recipe(overrides={pattern: values})


def test_the_toml_is_what_a_person_would_write() -> None:
    overrides = {r"re:.*\.v_proj": {"bits": 4}}
    recipe = Recipe(bits=3, calibration="c4", options={"damping": 0.01}, overrides=overrides)
    written = tomllib.loads(recipe.to_toml())
    assert written["bits"] == 3
    assert written["calibration"] == "c4"
    assert written["options"] == {"damping": 0.01}
    assert written["overrides"] == overrides


# What a method wishes applies where the recipe leaves it open, and nowhere else.


def wishes(bits: int) -> dict[str, str]:
    """Sign bases at 2 bits, a real zero-point elsewhere."""
    return {"grid": "sign"} if bits == 2 else {"zero_point": "real"}


def test_defaults_leave_grid_and_zero_point_to_the_method_and_are_uniform_and_integer_without_one() -> None:
    recipe = Recipe()
    assert (recipe.grid, recipe.zero_point) == ("auto", "auto")
    assert recipe.scheme == recipe.scheme_of(Q) == Scheme(4, 128, "integer", "float16", "uniform")
    assert recipe.scheme_of(Q, lambda bits: {}) == recipe.scheme
    assert recipe.scheme_of(Q, wishes) == Scheme(4, 128, "real")
    assert Recipe(bits=2).scheme_of(Q, wishes) == Scheme(2, 128, "none", grid="sign")


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", BITS)
def test_what_the_recipe_says_goes_before_the_methods_wish(bits, zero_point) -> None:
    said = Recipe(bits=bits, grid="uniform", zero_point=zero_point)
    assert said.scheme_of(Q, wishes) == said.scheme == Scheme(bits, 128, zero_point)
    assert said.scheme_of(Q, lambda bits: {"grid": "sign", "zero_point": "integer"}) == said.scheme


def test_grid_and_zero_point_are_left_open_one_by_one() -> None:
    both = {"grid": "uniform", "zero_point": "real"}
    assert Recipe(grid="sign").scheme_of(Q, lambda bits: both) == Scheme(4, 128, "none", grid="sign")
    assert Recipe(zero_point="none").scheme_of(Q, lambda bits: both) == Scheme(4, 128, "none")
    assert Recipe(grid="uniform").scheme_of(Q, lambda bits: both) == Scheme(4, 128, "real")


@pytest.mark.parametrize("zero_point", ["auto", *ZERO_POINTS])
def test_a_sign_grid_has_no_zero_point_whoever_asks_for_one(zero_point) -> None:
    sign = Scheme(2, 128, "none", grid="sign")
    # One that is given is the embedding's then, which is on a uniform grid.
    assert Recipe(bits=2, grid="sign", zero_point=zero_point, embedding_bits=8).scheme_of(Q) == sign
    assert Recipe(bits=2, zero_point=zero_point).scheme_of(Q, wishes) == sign
    assert Recipe(zero_point=zero_point, overrides={Q: {"bits": 2, "grid": "sign"}}).scheme_of(Q) == sign


@pytest.mark.parametrize("recipe", [{}, {"grid": "uniform", "zero_point": "none"}, {"grid": "sign"}])
def test_an_override_goes_before_recipe_and_wish(recipe) -> None:
    overrides = {Q: {"grid": "uniform", "zero_point": "real"}, DOWN: {"grid": "sign"}}
    built = Recipe(bits=3, overrides=overrides, **recipe)
    assert built.scheme_of(Q, lambda bits: {"grid": "sign"}) == Scheme(3, 128, "real")
    assert built.scheme_of(Q, lambda bits: {"zero_point": "integer"}) == Scheme(3, 128, "real")
    assert built.scheme_of(DOWN, lambda bits: {"grid": "uniform"}) == Scheme(3, 128, "none", grid="sign")


def test_an_override_of_one_leaves_the_other_to_the_recipe_and_then_to_the_method() -> None:
    overrides = {Q: {"grid": "uniform"}, DOWN: {"zero_point": "none"}}
    assert Recipe(bits=2, overrides=overrides).scheme_of(Q, wishes) == Scheme(2, 128, "integer")
    assert Recipe(bits=3, overrides=overrides).scheme_of(Q, wishes) == Scheme(3, 128, "real")
    assert Recipe(bits=3, zero_point="none", overrides=overrides).scheme_of(Q, wishes) == Scheme(3, 128, "none")
    assert Recipe(bits=3, overrides=overrides).scheme_of(DOWN, wishes) == Scheme(3, 128, "none")


def test_auto_in_an_override_hands_it_back_to_the_method() -> None:
    recipe = Recipe(bits=2, grid="uniform", zero_point="none", overrides={Q: {"grid": "auto", "zero_point": "auto"}})
    assert recipe.scheme_of(Q, wishes) == Scheme(2, 128, "none", grid="sign")
    assert recipe.scheme_of(Q, lambda bits: {"zero_point": "real"}) == Scheme(2, 128, "real")
    assert recipe.scheme_of(Q) == Scheme(2)
    assert recipe.scheme_of(DOWN, wishes) == Scheme(2, 128, "none")


def test_the_method_is_asked_for_the_bits_that_hold_there() -> None:
    asked: list[int] = []

    def prefers(bits: int) -> dict[str, str]:
        asked.append(bits)
        return wishes(bits)

    recipe = Recipe(bits=4, overrides={Q: {"bits": 2}, DOWN: {"skip": True}})
    assert recipe.scheme_of(Q, prefers) == Scheme(2, 128, "none", grid="sign")
    assert recipe.scheme_of("model.layers.1.mlp.up_proj", prefers) == Scheme(4, 128, "real")
    assert recipe.scheme_of(DOWN, prefers) is None
    assert asked[:2] == [2, 4]


@pytest.mark.parametrize("grid", ["auto", "uniform", "sign"])
@pytest.mark.parametrize(("zero_point", "result"), [("auto", "integer"), ("none", "none"), ("real", "real")])
def test_embeddings_follow_the_recipe_on_a_uniform_grid(grid, zero_point, result) -> None:
    recipe = Recipe(bits=2, grid=grid, zero_point=zero_point, embedding_bits=8)
    assert recipe.embedding_scheme == Scheme(8, 128, result)


def test_a_wish_that_no_scheme_can_meet_is_an_error() -> None:
    with pytest.raises(BadRecipe, match="a sign grid has at most 4 bits"):
        Recipe(bits=8).scheme_of(Q, lambda bits: {"grid": "sign"})
    with pytest.raises(BadRecipe, match="a sign grid has at most 4 bits"):
        Recipe(bits=8, grid="sign")
    with pytest.raises(BadRecipe, match="a sign grid has at most 4 bits"):
        Recipe(bits=2, grid="sign", overrides={Q: {"bits": 8}})


@pytest.mark.parametrize("method", METHODS)
def test_wishes_of_every_method_are_schemes_at_every_width(method) -> None:
    steps = METHODS[method].build(METHODS[method].configure({}))
    for site in ("attention_in", "attention_out", "mlp_in", "mlp_hidden"):
        for bits in BITS:
            scheme = Recipe(bits=bits).scheme_of(Q, partial(steps.prefers, site))
            assert scheme is not None
            assert scheme.bits == bits


def test_d2quant_wishes_sign_bases_where_its_program_has_them() -> None:
    steps = METHODS["d2quant"].steps({})
    for bits in BITS:
        for site in ("attention_in", "attention_out", "mlp_in", "mlp_hidden"):
            sign = bits in (2, 3) and site == "mlp_hidden"
            scheme = Recipe(bits=bits).scheme_of(DOWN, partial(steps.prefers, site))
            assert scheme == Scheme(bits, 128, "none" if sign else "integer", grid="sign" if sign else "uniform")


def test_d2quant_on_a_uniform_grid_is_version_p_everywhere() -> None:
    """Uniform codes at all sites, with column scales where the method has them."""
    steps = METHODS["d2quant"].steps({})
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    for bits in BITS:
        for site in ("attention_in", "attention_out", "mlp_in", "mlp_hidden"):
            scheme = Recipe(bits=bits, group_size=16, grid="uniform").scheme_of(DOWN, partial(steps.prefers, site))
            assert scheme == Scheme(bits, 16)
            fitted = steps.rounder_of(site).fitter.fit(weight, scheme, None)
            assert (fitted.column_scales is not None) == (site == "mlp_hidden")
            assert fitted.levels.scales.shape == (6, 1)


# Inputs follow the weights' groups unless they are told otherwise.


def test_inputs_stay_as_they_are_by_default() -> None:
    assert Recipe().activation is None
    assert Recipe().activation_of(Q, Recipe().scheme) is None


def test_inputs_take_the_weights_groups_or_their_own() -> None:
    scheme = Scheme(4, 64)
    assert Recipe(activation_bits=4).activation_of(Q, scheme) == ActivationScheme(4, 64)
    recipe = Recipe(activation_bits=8, activation_group_size=-1, activation_zero_point="none", activation_clip=0.9)
    assert recipe.activation_of(Q, scheme) == ActivationScheme(8, -1, "none", "uniform", 0.9)


def test_inputs_beside_mxfp4_weights_are_mxfp4_at_4_bits_and_integers_at_8() -> None:
    recipe = Recipe(grid="mxfp4", group_size=32, activation_bits=4)
    assert recipe.scheme == Scheme(4, 32, "none", "e8m0", "mxfp4")
    assert recipe.activation == ActivationScheme(4, 32, "none", "mxfp4")
    assert Recipe(grid="mxfp4", group_size=32, activation_bits=8).activation == ActivationScheme(8, 32)


def test_an_override_sets_the_bits_of_one_input() -> None:
    recipe = Recipe(activation_bits=4, overrides={Q: {"activation_bits": 16}, DOWN: {"activation_bits": 8}})
    assert recipe.activation_of(Q, recipe.scheme) is None
    assert recipe.activation_of(DOWN, recipe.scheme) == ActivationScheme(8, 128)


@pytest.mark.parametrize(("values", "message"), [
    ({"activation_bits": 5}, "activation bits are 5; choose one of 3, 4, 8"),
    ({"activation_bits": 4, "activation_group_size": 0}, "group_size is 0"),
    ({"activation_bits": 4, "activation_zero_point": "real"}, "choose one of none, integer"),
    ({"activation_bits": 4, "activation_clip": 0.0}, "clip is 0.0"),
    ({"grid": "mxfp4", "group_size": 32, "activation_bits": 4, "activation_clip": 0.5}, "no clip"),
    ({"grid": "mxfp4"}, "set bits = 4, group_size = 32"),
    ({"scale_type": "e8m0"}, "scale_type is 'e8m0'"),
])  # fmt: skip
def test_inputs_that_cannot_be_are_refused(values, message) -> None:
    with pytest.raises(BadRecipe, match=message):
        Recipe(**values)
