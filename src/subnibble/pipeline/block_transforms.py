"""A method's transforms on a block, before anything of it is rounded."""

from __future__ import annotations

from dataclasses import replace

from subnibble.arch.site import Site
from subnibble.calibrate.stream import SiteStatistics
from subnibble.errors import NumericalFailure
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block
from subnibble.tensor.hadamard import hadamard_blocks
from subnibble.transforms.input_basis import InputBasis


def prepare_block_(block: Block, steps: Steps, found: SiteStatistics | None) -> dict[str, InputBasis]:
    """Carry out the method's transforms on a block in float32; the bases in which readers meet their sites' tensors.

    found: statistics before, None where no step needs them.
    """
    bases = {site.name: _online(block, site, steps) for site in block.arch.sites}
    if found is None:
        return bases
    for transform in steps.transforms:
        try:
            transform(block, found)
        except NumericalFailure as error:
            # What rounds for a transform's search knows of no block.
            raise NumericalFailure(f"{block.path}: {str(error).removeprefix(block.path).lstrip()}") from error
    if steps.saliency is not None:
        for site in block.arch.sites:
            order = steps.saliency(block, site, found)
            bases[site.name] = replace(bases[site.name], order=order)
    return bases


def _online(block: Block, site: Site, steps: Steps) -> InputBasis:
    width = block.linear(site.readers[0]).in_features
    return InputBasis(blocks=hadamard_blocks(width) if site.name in steps.online else ())
