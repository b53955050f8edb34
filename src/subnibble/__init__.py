"""subnibble quantizes large language models to 2, 3 and 4 bits and runs the packed result.

Importing it registers the packed format with transformers, at once or as soon as transformers is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from subnibble.version import __version__

if TYPE_CHECKING:
    from subnibble.checkpoint.checksums import unverified
    from subnibble.conversion.convert import convert
    from subnibble.evaluation.compare import compare
    from subnibble.evaluation.evaluate import Evaluation, evaluate
    from subnibble.export.fold import fold_norm_biases_
    from subnibble.generate.generator import Generator
    from subnibble.generate.prefix import add_prefix
    from subnibble.pipeline.distill_checkpoint import distill_checkpoint
    from subnibble.pipeline.driver import quantize
    from subnibble.pipeline.estimate import estimate
    from subnibble.presets import preset
    from subnibble.recipe import Recipe

__all__ = [
    "Evaluation",
    "Generator",
    "Recipe",
    "__version__",
    "add_prefix",
    "compare",
    "convert",
    "distill_checkpoint",
    "estimate",
    "evaluate",
    "fold_norm_biases_",
    "preset",
    "quantize",
    "unverified",
]

# Public name -> the module that defines it, imported at first use: `subnibble --help` must not import torch.
_HOMES = {
    "Evaluation": "evaluation.evaluate",
    "Generator": "generate.generator",
    "Recipe": "recipe",
    "add_prefix": "generate.prefix",
    "compare": "evaluation.compare",
    "convert": "conversion.convert",
    "distill_checkpoint": "pipeline.distill_checkpoint",
    "estimate": "pipeline.estimate",
    "evaluate": "evaluation.evaluate",
    "fold_norm_biases_": "export.fold",
    "preset": "presets",
    "quantize": "pipeline.driver",
    "unverified": "checkpoint.checksums",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _register(module: object) -> None:
    # The import registers the format. If hf/ itself triggered the import of transformers, this import is under way.
    import subnibble.hf  # noqa: F401


wrapt.register_post_import_hook(_register, "transformers.quantizers.auto")
