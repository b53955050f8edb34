"""What methods are made of, and that each of their options says something about it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pytest

from subnibble.corrections.low_rank import LowRank
from subnibble.corrections.outliers import OutlierColumns
from subnibble.corrections.salient import SalientColumns
from subnibble.errors import BadRecipe
from subnibble.methods import METHODS
from subnibble.methods.choices import OPTION_CHOICES
from subnibble.methods.method import Method, Steps
from subnibble.rounding.dual_scale import DualScale, RowScale
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN
from subnibble.transforms.awq import ActivationAwareScale
from subnibble.transforms.flatten import Flatten, NormFlatten
from subnibble.transforms.saliency import Saliency
from subnibble.tuning.tuning import Tuning

# What an option needs of others to say anything, beside the defaults.
COMPANY: dict[str, dict[str, Any]] = {
    "damping": {"rounding": "gptq"},
    "order": {"rounding": "gptq"},
    "outliers": {"over": "atom"},
    "iterations": {"columns": "all"},
    "sweeps": {"asymmetry": "shifted"},
    "rows": {"columns": "none"},
}
OPTIONS = [(m, item.name) for m in METHODS.values() for item in fields(m.options)]


def company(method: Method, option: str) -> dict[str, Any]:
    has = {item.name for item in fields(method.options)}
    return {key: value for key, value in COMPANY.get(option, {}).items() if key in has}


def others(default: Any, option: str) -> list[Any]:
    """Every other word that an option may be, or another number."""
    if option == "factor_bits":
        return [4]
    if isinstance(default, str):
        return [word for word in OPTION_CHOICES[option].split(", ") if word != default]
    return [default / 2 + 0.1] if isinstance(default, float) else [2 * default + 1]


def other_steps(method: Method, option: str) -> list[Steps]:
    """The steps of a method with each other value of an option; those that its rules refuse are left out."""
    known = company(method, option)
    default = getattr(method.options(**known), option)
    steps_of = []
    for value in others(default, option):
        with suppress(BadRecipe):
            steps_of.append(method.steps(known | {option: value}))
            assert steps_of[-1] == method.steps(known | {option: value})
    return steps_of


@pytest.mark.parametrize(("method", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_every_value_of_an_option_makes_other_steps(method: Method, option: str) -> None:
    usual = method.steps(company(method, option))
    steps_of = other_steps(method, option)
    assert steps_of
    assert all(steps != usual for steps in steps_of)
    for index, steps in enumerate(steps_of):
        assert all(steps != other for other in steps_of[index + 1 :])


def test_an_option_that_is_dropped_is_noticed() -> None:
    gptq = METHODS["gptq"]
    deaf = replace(gptq, build=lambda options: gptq.build(replace(options, damping=0.01)))
    assert all(steps == deaf.steps({}) for steps in other_steps(deaf, "damping"))


def gptq(fitter: Any, form: str = "none", alpha: float = 0.25, weighting: str = "none", order: str = "gar") -> GPTQ:
    asymmetry = Asymmetry(form, alpha)
    return GPTQ(fitter, damping=0.01, order=order, weighting=weighting, asymmetry=asymmetry, sweeps=0)


def natural(clip: Clip) -> GPTQ:
    """As the methods that treat activations, too, have it."""
    return gptq(clip, order="natural")


MINMAX = Clip("minmax", 2.0)
SEARCHED, RELEASED = Clip("mse", 2.0), Clip("mse", 2.4)
D2 = gptq(RELEASED, "released")
D2_DOWN = {"mlp_hidden": gptq(DualScale(RELEASED, 15), "released")}
# As their papers and released programs have them, see each method's file: rounder, that of down-projections, rest.
COMPOSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "rtn": (RTN(SEARCHED), {}, {}),
    "awq": (RTN(SEARCHED, "hessian"), {}, {"transforms": (ActivationAwareScale(),)}),
    "gptq": (gptq(SEARCHED), {}, {}),
    "gptaq": (gptq(SEARCHED, "released"), {}, {}),
    "d2quant": (D2, D2_DOWN, {"rotation": "groups", "mean_shift": "published"}),
    "d2quant-plus": (gptq(DualScale(SEARCHED, 10), "shifted", 0.5, "hessian"), {}, {"rotation": "groups"}),
    "smoothquant": (RTN(SEARCHED, "hessian"), {}, {"transforms": (NormFlatten(0.5, 0.5),)}),
    "l2qer": (RTN(SEARCHED), {}, {"correction": LowRank(64, "l2qer", 8)}),
    "qera": (RTN(SEARCHED), {}, {"correction": LowRank(64, "qera", 8)}),
    "quarot": (
        natural(SEARCHED),
        {},
        {"rotation": "full", "online": ("attention_out", "mlp_hidden"), "value_rotation": "hadamard"},
    ),
    "serq": (
        natural(MINMAX),
        {},
        {
            "transforms": (Flatten(1.0, 0.0),),
            "saliency": Saliency("size", "gather", "falling"),
            "correction": SalientColumns(128, MINMAX, "none"),
        },
    ),
    "serq-plus": (
        natural(SEARCHED),
        {},
        {
            "transforms": (Flatten(1.0, 0.0),),
            "saliency": Saliency("size", "gather", "falling"),
            "correction": SalientColumns(128, SEARCHED, "salient"),
        },
    ),
    "atom": (
        natural(SEARCHED),
        {},
        {
            "saliency": Saliency("energy", "gather", "rising"),
            "correction": OutlierColumns(128),
            "inputs": "quantized",
        },
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_method_is_made_of(name: str) -> None:
    rounder, rounders, rest = COMPOSED[name]
    steps = METHODS[name].steps({})
    assert steps == Steps(rounder, rounders=rounders, prefers=steps.prefers, cache=steps.cache, **rest)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grids_that_methods_prefer(bits: int) -> None:
    wishes = {name: METHODS[name].steps({}).prefers for name in COMPOSED}
    signs = {"grid": "sign"} if bits < 4 else {}
    assert dict(wishes["d2quant"]("mlp_hidden", bits)) == signs
    assert dict(wishes["d2quant"]("attention_in", bits)) == {}
    for site in ("mlp_hidden", "attention_in"):
        assert dict(wishes["d2quant-plus"](site, bits)) == {"zero_point": "real"}
        for name in ("rtn", "awq", "gptq", "gptaq", "smoothquant", "l2qer", "qera", "quarot"):
            assert dict(wishes[name](site, bits)) == {}, name
        assert dict(wishes["serq"](site, bits)) == dict(wishes["atom"](site, bits)) == {"zero_point": "none"}
        assert dict(wishes["serq-plus"](site, bits)) == {"zero_point": "integer"}


@pytest.mark.parametrize("parts", [
    {"saliency": Saliency()}, {"correction": SalientColumns(16)}, {"correction": LowRank(8, "qera", 8)},
    {"correction": OutlierColumns(16)}, {"online": ("mlp_hidden",)},
], ids=str)  # fmt: skip
def test_a_rounder_that_scales_columns_is_refused_where_they_would_meet_others(parts: dict[str, Any]) -> None:
    with pytest.raises(BadRecipe, match="online transform of its input; leave one of them out"):
        Steps(GPTQ(DualScale()), **parts)
    with pytest.raises(BadRecipe, match="online transform of its input; leave one of them out"):
        Steps(GPTQ(), rounders={"mlp_hidden": GPTQ(DualScale())}, **parts)
    Steps(GPTQ(RowScale()), **parts)
    Steps(GPTQ(), rounders={"mlp_hidden": GPTQ(DualScale())}, online=("attention_out",))


def test_salient_columns_need_an_order() -> None:
    with pytest.raises(BadRecipe, match='saliency is "none" with rank 128'):
        METHODS["serq"].steps({"saliency": "none"})
    with pytest.raises(BadRecipe, match="permutation 'offline'"):
        METHODS["serq"].steps({"saliency": "none", "rank": 0, "permutation": "offline"})
    with pytest.raises(BadRecipe, match="choose one of none, size, energy"):
        METHODS["serq"].steps({"saliency": "loud"})
    assert METHODS["serq"].steps({"saliency": "none", "rank": 0}).saliency is None


# What of each method's steps does not go with tuning; nothing of the others.
UNTUNED = {
    **dict.fromkeys(
        ("awq", "smoothquant", "serq", "serq-plus", "d2quant", "d2quant-uniform"), "transforms|a mean-shift"
    ),
    **dict.fromkeys(("gptaq", "d2quant-plus"), "a rounder with asymmetry"),
    **dict.fromkeys(("l2qer", "qera"), "low-rank factors of the rounding error"),
}


@pytest.mark.parametrize("name", METHODS)
def test_blocks_of_any_method_can_be_tuned_unless_a_step_forbids_it(name: str) -> None:
    steps = replace(METHODS[name].steps({}), tuning=None)
    if steps.inputs == "exact" and name not in UNTUNED:
        with pytest.raises(BadRecipe, match='use inputs = "quantized"'):
            replace(steps, tuning=Tuning())
    steps = replace(steps, inputs="quantized")
    if name in UNTUNED:
        with pytest.raises(BadRecipe, match=f"tuning .*({UNTUNED[name]})"):
            replace(steps, tuning=Tuning())
    else:
        assert replace(replace(steps, tuning=Tuning()), tuning=None) == steps
    if steps.transforms and not steps.needs_drift:
        assert replace(steps, transforms=(), mean_shift="none", tuning=Tuning()).rounder == steps.rounder


@pytest.mark.parametrize("over", ["atom", "quarot"])
def test_bisup_is_its_base_on_quantized_inputs_and_tuned(over: str) -> None:
    steps = METHODS["bisup"].steps({"over": over, "effort": "fast", "rank": 8})
    assert steps == replace(METHODS[over].steps({}), inputs="quantized", tuning=Tuning(effort="fast", rank=8))


def test_rows_and_columns_of_d2quant_choose_fitters() -> None:
    def fitters(**options: str) -> tuple[Any, Any]:
        steps = METHODS["d2quant"].steps(options)
        result = steps.rounder_of("attention_in"), steps.rounder_of("mlp_hidden")
        assert all(isinstance(rounder, GPTQ) for rounder in result)
        return result[0].fitter, result[1].fitter

    dual, rows = DualScale(RELEASED, 15), RowScale(RELEASED, 15)
    assert fitters() == (RELEASED, dual)
    assert fitters(columns="none") == (RELEASED, RELEASED)
    assert fitters(columns="all") == (dual, dual)
    assert fitters(rows="refit") == (rows, dual)
    assert fitters(columns="none", rows="refit") == (rows, rows)
