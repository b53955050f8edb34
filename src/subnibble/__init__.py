"""subnibble quantizes large language models to 2, 3 and 4 bits and runs the packed result.

Importing it registers the packed format with transformers, at once or as soon as transformers is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

from subnibble.version import __version__

if TYPE_CHECKING:
    from subnibble.pipeline import quantize
    from subnibble.recipe import Recipe

__all__ = ["Recipe", "__version__", "quantize"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `subnibble --help` need not import torch.
    if name == "quantize":
        from subnibble.pipeline import quantize

        return quantize
    if name == "Recipe":
        from subnibble.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _register(module: object) -> None:
    # Importing it registers; where hf.py itself is what imports transformers, it is under way already.
    import subnibble.hf  # noqa: F401


wrapt.register_post_import_hook(_register, "transformers.quantizers.auto")
