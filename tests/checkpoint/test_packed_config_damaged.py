"""What `quantization_config` does not know, or has the wrong type or size, is an error that says so."""

import copy
import re

import pytest
from packed_config_samples import COMPOSED, CONFIG, DOWN, HEAD, NORM, SCALED, TABLE, Q, through_json

from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import HeadInputSpec
from subnibble.errors import CheckpointError


@pytest.mark.parametrize("version", [0, 2, 7, -1, "1", "2", 1.0, 2.0, True, False, [1], None])
@pytest.mark.parametrize("config", [CONFIG, SCALED, COMPOSED], ids=["plain", "scaled", "composed"])
def test_another_version_is_an_error_that_says_so(config, version) -> None:
    values = {**through_json(config), "format_version": version}
    said = re.escape(f"mine: format version {version!r}; this subnibble reads version 1")
    with pytest.raises(CheckpointError, match=f"^{said}"):
        PackedConfig.from_dict(values, "mine")


def test_a_missing_version_is_an_error() -> None:
    values = through_json(CONFIG)
    del values["format_version"]
    with pytest.raises(CheckpointError, match="format version None"):
        PackedConfig.from_dict(values)


def changed(path: list, value: object, config: PackedConfig = CONFIG) -> dict:
    """The example with one value set, or removed where `value` is `KeyError`."""
    values = copy.deepcopy(through_json(config))
    table = values
    for key in path[:-1]:
        table = table[key]
    if value is KeyError:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    return values


BROKEN = {
    "unknown top key": (["experts"], {}, "unknown key 'experts'"),
    "no schemes": (["schemes"], KeyError, "schemes"),
    "no modules": (["modules"], KeyError, "modules"),
    "schemes no table": (["schemes"], [], "damaged"),
    "modules no table": (["modules"], ["a"], "damaged"),
    "unknown scheme key": (["schemes", "w3g128", "outliers"], 3, "unknown scheme key 'outliers'"),
    "unknown grid": (["schemes", "w3g128", "grid"], "nvfp4", "grid is 'nvfp4'; choose one of uniform, sign, mxfp4"),
    "mxfp4 grid of another width": (["schemes", "w3g128", "grid"], "mxfp4", "an mxfp4 grid has 4 bits"),
    "e8m0 scales of a uniform grid": (["schemes", "w3g128", "scale_type"], "e8m0", "scale_type is 'e8m0'"),
    "sign grid with zero-points": (["schemes", "w3g128", "grid"], "sign", "no zero-point"),
    "scheme without bits": (["schemes", "w3g128", "bits"], KeyError, "bits"),
    "scheme without a group size": (["schemes", "w3g128", "group_size"], KeyError, "no group_size in"),
    "scheme without a type of scales": (["schemes", "w3g128", "scale_type"], KeyError, "no scale_type in"),
    "scheme out of range": (["schemes", "w3g128", "bits"], 5, "bits is 5"),
    "scheme bits a float": (["schemes", "w3g128", "bits"], 4.0, "bits is 4.0"),
    "scheme no table": (["schemes", "w3g128"], 3, "damaged"),
    "scheme type unhashable": (["schemes", "w3g128", "scale_type"], ["float16"], "damaged"),
    "unknown kind": (["modules", Q, "kind"], "convolution", "kind 'convolution'"),
    "kind of another entry": (["modules", Q, "kind"], "embedding", "kind 'embedding'"),
    "no kind": (["modules", Q, "kind"], KeyError, "kind"),
    "kind unhashable": (["modules", Q, "kind"], ["linear"], "damaged"),
    "unknown module key": (["modules", Q, "gathers"], True, "gathers"),
    "linear without rows": (["modules", Q, "rows"], KeyError, "kind 'linear'"),
    "linear without bias": (["modules", Q, "bias"], KeyError, "kind 'linear'"),
    "linear without ranges": (["modules", Q, "ranges"], KeyError, "kind 'linear'"),
    "head without table": (["modules", HEAD, "table"], KeyError, "kind 'tied_head'"),
    "norm bias without rows": (["modules", NORM, "rows"], KeyError, "kind 'norm_bias'"),
    "embedding with bias": (["modules", TABLE, "bias"], False, "kind 'embedding'"),
    "unknown scheme name": (["modules", Q, "ranges"], [[64, "w5"]], "w5"),
    "range of one value": (["modules", Q, "ranges"], [[64]], "damaged"),
    "range of three values": (["modules", Q, "ranges"], [[64, "w3g128", 1]], "damaged"),
    "ranges a number": (["modules", Q, "ranges"], 64, "damaged"),
    "rows null": (["modules", Q, "rows"], None, "damaged"),
    "entry no table": (["modules", Q], "linear", "damaged"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("config", [CONFIG, SCALED], ids=["plain", "scaled"])
def test_what_is_not_known_is_an_error(config, broken) -> None:
    path, value, message = BROKEN[broken]
    with pytest.raises(CheckpointError, match=message):
        PackedConfig.from_dict(changed(path, value, config), "folder/config.json")


COERCED = {
    "rows a fraction": (["modules", Q, "rows"], 64.5),
    "rows a string": (["modules", Q, "rows"], "64"),
    "rows negative": (["modules", Q, "rows"], -64),
    "columns a fraction": (["modules", Q, "ranges"], [[64.5, "w3g128"]]),
    "columns zero": (["modules", Q, "ranges"], [[0, "w3g128"]]),
    "no range": (["modules", Q, "ranges"], []),
    "bias a string": (["modules", Q, "bias"], "false"),
    "table a number": (["modules", HEAD, "table"], 3),
}


@pytest.mark.parametrize("wrong", COERCED)
def test_a_value_of_the_wrong_type_or_size_is_an_error_and_not_converted(wrong) -> None:
    with pytest.raises(CheckpointError):
        PackedConfig.from_dict(changed(*COERCED[wrong]))


COMPOSED_BROKEN = {
    "blocks of another sum": ("hadamard", [128, 32], "do not add up to 192"),
    "a block of zero": ("hadamard", [192, 0], "positive count"),
    "a block a fraction": ("hadamard", [192.0], "where int is expected"),
    "blocks null": ("hadamard", None, "damaged"),
    "blocks a number": ("hadamard", 192, "damaged"),
    "a block without a Hadamard matrix": ("hadamard", [92, 100], "92"),
    "salient wider than the weight": ("salient", [[193, "mxfp4g32"]], "193 salient columns"),
    "salient of no range": ("salient", [], "without column ranges"),
    "salient of an unknown scheme": ("salient", [[32, "w5"]], "w5"),
    "salient true": ("salient", True, "damaged"),
    "residual without salient": ("salient", KeyError, "residual is 'salient' without salient"),
    "salient null": ("salient", None, "salient says None"),
    "no gather": ("gather", False, "gather says False"),
    "no blocks": ("hadamard", [], "hadamard says []"),
    "unknown residual": ("residual", "input", "residual is 'input'"),
    "residual null": ("residual", None, "where str is expected"),
    "unknown activation": ("activation", "a5", "a5"),
    "a weight scheme as an activation": ("activation", "w3g128", "w3g128"),
    "an activation in place": ("activation", {"bits": 4}, "damaged"),
    "gather a number": ("gather", 1, "where bool is expected"),
    "gather null": ("gather", None, "where bool is expected"),
    "column_scale a number": ("column_scale", 0, "where bool is expected"),
    "bias null": ("bias", None, "where bool is expected"),
    "a rank of zero": ("low_rank", {"rank": 0, "down": [[192, "w3g128"]], "up": [[8, "w3g128"]]}, "positive count"),
    "down too narrow": ("low_rank", {"rank": 8, "down": [[191, "w3g128"]], "up": [[8, "w3g128"]]}, "does not fit"),
    "up of another rank": ("low_rank", {"rank": 8, "down": [[192, "w3g128"]], "up": [[9, "w3g128"]]}, "does not fit"),
    "down of an unknown scheme": ("low_rank", {"rank": 8, "down": [[192, "w5"]], "up": [[8, "w3g128"]]}, "w5"),
    "a branch without up": ("low_rank", {"rank": 8, "down": [[192, "w3g128"]]}, "low_rank has keys"),
    "a branch with a bias": (
        "low_rank",
        {"rank": 8, "down": [[192, "w3g128"]], "up": [[8, "w3g128"]], "bias": False},
        "low_rank has keys",
    ),
    "a branch that is a list": ("low_rank", [[192, "w3g128"]], "damaged"),
    "an unknown key": ("kv_cache", 4, "kind 'linear' has keys"),
    **{f"no {key}": (key, KeyError, "kind 'linear' has keys") for key in ("rows", "ranges", "bias")},
}


@pytest.mark.parametrize("broken", COMPOSED_BROKEN)
def test_a_damaged_composed_linear_is_an_error(broken) -> None:
    key, value, message = COMPOSED_BROKEN[broken]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        PackedConfig.from_dict(changed(["modules", DOWN, key], value, COMPOSED), "folder/config.json")


@pytest.mark.parametrize("outliers", [192, 200])
def test_outliers_that_leave_nothing_are_an_error(outliers) -> None:
    values = through_json(COMPOSED)
    values["activations"]["a4g128-clip0.9"]["outliers"] = outliers
    del values["modules"][DOWN]["salient"], values["modules"][DOWN]["residual"]
    with pytest.raises(CheckpointError, match=f"{outliers} outlier channels do not fit 192 columns"):
        PackedConfig.from_dict(values)


def test_outliers_beside_salient_columns_are_an_error() -> None:
    values = through_json(COMPOSED)
    values["activations"]["a4g128-clip0.9"]["outliers"] = 8
    assert values["modules"][DOWN]["salient"]
    with pytest.raises(CheckpointError, match="salient columns as well"):
        PackedConfig.from_dict(values)


ACTIVATIONS_BROKEN = {
    "no activations": (["activations"], KeyError, "activations"),
    "activations null": (["activations"], None, "damaged"),
    "activations a list": (["activations"], [], "damaged"),
    "unknown key": (
        ["activations", "a4g128-clip0.9", "scale_type"],
        "e8m0",
        "unknown activation scheme key 'scale_type'",
    ),
    "no bits": (["activations", "a4g128-clip0.9", "bits"], KeyError, "bits"),
    "bits out of range": (["activations", "a4g128-clip0.9", "bits"], 5, "bits are 5"),
    "bits a float": (["activations", "a4g128-clip0.9", "bits"], 4.0, "bits are 4.0"),
    "no grid": (["activations", "a4g128-clip0.9", "grid"], KeyError, "no grid in"),
    "group of zero": (["activations", "a4g128-clip0.9", "group_size"], 0, "group_size is 0"),
    "real zero-points": (["activations", "a4g128-clip0.9", "zero_point"], "real", "zero_point is 'real'"),
    "a sign grid": (["activations", "a4g128-clip0.9", "grid"], "sign", "grid is 'sign'"),
    "clip of zero": (["activations", "a4g128-clip0.9", "clip"], 0, "clip is 0"),
    "clip a string": (["activations", "a4g128-clip0.9", "clip"], "1", "clip is '1'"),
}


@pytest.mark.parametrize("broken", ACTIVATIONS_BROKEN)
def test_a_damaged_activation_scheme_is_an_error(broken) -> None:
    path, value, message = ACTIVATIONS_BROKEN[broken]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        PackedConfig.from_dict(changed(path, value, COMPOSED), "folder/config.json")


@pytest.mark.parametrize("widths", [[], [0], [16, -1], [1.0], "16", 16, None])
def test_damaged_widths_of_such_a_matrix_are_refused(widths) -> None:
    values = through_json(PackedConfig({f"{HEAD}.mix": HeadInputSpec((16,))}))
    values["modules"][f"{HEAD}.mix"]["widths"] = widths
    with pytest.raises(CheckpointError, match="mine is damaged"):
        PackedConfig.from_dict(values, "mine")
