"""A tuned block's input is, number for number, the one that runs: `site_input.apply`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from subnibble.runtime import site_input
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.hadamard import hadamard_blocks
from subnibble.tensor.linear import SiteInput
from subnibble.transforms.input_basis import InputBasis
from subnibble.tuning.linear import TunedInput

CHANNELS = 48
ORDER = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(1))
SCHEMES = {
    "exact": None,
    "4 bits": ActivationScheme(4, 16, clip=0.9),
    "outliers": ActivationScheme(4, 16, "none", outliers=8),
    "mxfp4": ActivationScheme(4, 32, "none", "mxfp4"),
}
BASES = {
    "natural": InputBasis(),
    "ordered": InputBasis(ORDER),
    "turned": InputBasis(ORDER, hadamard_blocks(CHANNELS)),
}


@pytest.mark.parametrize("share", [None, -0.25], ids=["clip", "learned clip"])
@pytest.mark.parametrize("requantized", [0, 12])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_tuned_input_is_the_one_that_runs(name: str, basis: str, requantized: int, share: float | None) -> None:
    scheme, input_basis = SCHEMES[name], BASES[basis]
    tuned = TunedInput(input_basis, torch.float32, requantized)
    if share is not None:
        tuned.learn_clip({scheme}, torch.device("cpu"))
        if tuned.clip is not None:
            tuned.clip.data.fill_(share)
    x = 3 * torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(2))

    result = tuned.enter(x.requires_grad_(True), scheme).flatten(0, 1)

    site = SiteInput(
        gather=input_basis.order, blocks=input_basis.blocks, activation=tuned.learned(scheme), requantized=requantized
    )
    applied = site_input.apply(x.detach(), site)
    assert torch.equal(result[:, :CHANNELS], replace(applied, rest=None).values())
    if applied.rest is not None:
        assert torch.equal(result[:, CHANNELS:], applied.rest.values())
    assert result.shape[1] == CHANNELS + (0 if scheme is None else requantized)
    # Gradients reach the input through all of it.
    result.sum().backward()
    assert bool((x.grad != 0).any())
