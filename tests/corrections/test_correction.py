"""What every correction must be, and the one that does nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linears import built
from subnibble import Recipe, quantize
from subnibble.arch.site import Role
from subnibble.checkpoint.module_specs import PackedLinearSpec, linear_spec
from subnibble.checkpoint.opening import open_source
from subnibble.corrections.correction import NOTHING, Correction
from subnibble.corrections.low_rank import LowRank
from subnibble.corrections.outliers import OutlierColumns
from subnibble.corrections.salient import SalientColumns
from subnibble.errors import BadRecipe
from subnibble.methods import METHODS
from subnibble.methods.method import Method, Steps
from subnibble.methods.none import Options
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.check import checked_plan
from subnibble.pipeline.observe import Observed
from subnibble.pipeline.round import Stack, round_stack
from subnibble.rounding.dual_scale import DualScale
from subnibble.rounding.gptaq import FORMS, Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.rounding.rtn import RTN
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedLayout, PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.saliency import Saliency
from subnibble.tuning.tuning import Tuning

SCHEME, INPUTS = Scheme(4, 16), ActivationScheme(4, 16)
ROWS, COLUMNS = 12, 48
CORRECTIONS = [
    NOTHING, SalientColumns(16), SalientColumns(16, residual="salient"), OutlierColumns(8),
    LowRank(4, "qera", 8),
]  # fmt: skip
every_correction = pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: type(c).__name__)


def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def gram() -> Tensor:
    x = torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(1))
    return x.T @ x


def stack(correction: Correction) -> Stack:
    return Stack("block", ("w",), (ROWS,), SCHEME, INPUTS, correction.requantized, "w")


@every_correction
def test_what_is_planned_is_what_is_made(correction: Correction) -> None:
    actual = round_stack(stack(correction), weight(), Observed(gram()), GPTQ(), correction)
    _, packed, salient = actual
    (branch,) = correction.branches([weight() - packed.dequantize()], gram(), torch.ones(COLUMNS), SCHEME)
    inputs, second = correction.inputs(INPUTS), None if salient is None else PackedTensor((salient,))
    linear = built(packed, activation=inputs, salient=second, requantized=correction.requantized, low_rank=branch)
    plain = PackedLinearSpec(PackedLayout(ROWS, ((COLUMNS, SCHEME),)), bias=False, activation=inputs)
    assert correction.planned(plain, SCHEME) == linear_spec(linear)
    schemes = {part.scheme for part in packed.ranges} | ({SCHEME} if salient is None else {salient.scheme})
    schemes |= set() if branch is None else {part.ranges[0].scheme for part in branch}
    assert schemes == {SCHEME, *correction.schemes(SCHEME)}


@every_correction
def test_what_tuning_rounds_is_what_rounding_to_nearest_makes(correction: Correction) -> None:
    """`salient_weight` and `outlier_weight`, by which blocks are tuned, are the parts that end up stored."""
    w = weight()
    _, packed, salient = round_stack(stack(correction), w, Observed(), RTN(), correction)
    salient_weight, outlier_weight = correction.salient_weight(w, SCHEME), correction.outlier_weight(w, SCHEME)
    if salient is not None:
        assert salient_weight is not None
        assert torch.equal(salient_weight, salient.dequantize())
    if correction.outliers:
        assert outlier_weight is not None
        assert torch.equal(outlier_weight, packed.dequantize()[:, -correction.outliers :])
    else:
        assert outlier_weight is None
    assert (salient_weight is None) == (correction.salient == 0)


def test_nothing_is_the_rounder_alone() -> None:
    rounding, packed, salient = round_stack(stack(NOTHING), weight(), Observed(gram()), GPTQ(), NOTHING)
    alone = GPTQ()(weight(), gram(), SCHEME, "w")
    assert torch.equal(packed.dequantize(), PackedRange.pack(alone.quantized, SCHEME).dequantize())
    assert salient is None
    assert rounding.notes == alone.notes
    assert NOTHING.inputs(INPUTS) == INPUTS


@pytest.mark.parametrize("form", FORMS)
@every_correction
def test_a_correction_would_undo_what_a_rounder_does_towards_full_precision_outputs(
    correction: Correction, form: str
) -> None:
    rounder = GPTQ(asymmetry=Asymmetry(form))
    if correction == NOTHING or form == "none":
        assert Steps(rounder, correction=correction).correction == correction
    else:
        with pytest.raises(
            BadRecipe,
            match="cannot be combined with salient columns, outliers or low-rank terms; leave one of them out",
        ):
            Steps(rounder, correction=correction)


@dataclass(frozen=True)
class Foreign(Rounder):
    """Somebody's rounder."""

    needs_drift: bool = False

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        return RTN()(weight, gram, scheme, where)


def test_what_a_rounder_of_ones_own_cannot_do_is_refused() -> None:
    Steps(Foreign(), correction=SalientColumns(16))
    Steps(Foreign(needs_drift=True))
    with pytest.raises(BadRecipe, match="cannot be combined with salient columns, outliers or low-rank terms"):
        Steps(Foreign(needs_drift=True), correction=SalientColumns(16))
    with pytest.raises(BadRecipe, match="tuning already targets full-precision outputs"):
        Steps(GPTQ(asymmetry=Asymmetry("shifted")), tuning=Tuning(), inputs="quantized")
    with pytest.raises(BadRecipe, match="tuning rounds on learned grids, which Foreign does not accept; use GPTQ"):
        Steps(Foreign(), tuning=Tuning(), inputs="quantized")


def test_corrections_that_cannot_be_tuned_say_so() -> None:
    for correction in (SalientColumns(16), OutlierColumns(8), NOTHING):
        Steps(RTN(), correction=correction, tuning=Tuning(), inputs="quantized")
    with pytest.raises(BadRecipe, match="tuning does not go with low-rank factors of the rounding error"):
        Steps(RTN(), correction=LowRank(4, "qera", 8), tuning=Tuning(), inputs="quantized")


@pytest.mark.parametrize(
    "steps",
    [
        Steps(RTN(), online=(Role.MLP_HIDDEN,)), Steps(RTN(), rounders={Role.MLP_HIDDEN: RTN()}),
        Steps(RTN(), tuning=Tuning(unsmoothed=(Role.MLP_HIDDEN,)), inputs="quantized"),
    ],
)  # fmt: skip
def test_a_site_that_an_architecture_does_not_have_is_an_error(steps: Steps, folders: dict[str, Path]) -> None:
    skeleton = Skeleton(open_source(folders["llama"]), torch.float32, torch.device("cpu"))
    checked_plan(Recipe("rtn", group_size=16), steps, skeleton)
    skeleton.arch = replace(skeleton.arch, sites=skeleton.arch.sites[:3])
    with pytest.raises(BadRecipe, match="at the site mlp_hidden, which llama does not have"):
        checked_plan(Recipe("rtn", group_size=16), steps, skeleton)


def test_a_rounder_must_say_that_it_scales_columns(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its scales may meet channels in another order than theirs."""

    class Silent(DualScale):
        has_column_scales = False

    steps = Steps(RTN(Silent()), saliency=Saliency())
    monkeypatch.setitem(METHODS, "silent", Method("silent", "a test", "a test", Options, lambda options: steps))
    recipe = Recipe("silent", group_size=16, calibration=str(token_file), num_windows=2, window=32)
    with pytest.raises(TypeError, match="RTN returned column scales, but its scales_columns is False"):
        quantize(folders["llama"], tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadRecipe, match="online transform of its input; leave one of them out"):
        Steps(RTN(DualScale()), saliency=Saliency())
