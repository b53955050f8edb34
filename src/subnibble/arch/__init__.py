"""The supported architectures, by the exact `model_type` of their config."""

from subnibble.arch.llama import LLAMA
from subnibble.arch.mistral import MISTRAL
from subnibble.arch.qwen2 import QWEN2
from subnibble.arch.qwen3 import QWEN3
from subnibble.arch.site import Arch
from subnibble.errors import UnsupportedModel

ARCHITECTURES: dict[str, Arch] = {arch.model_type: arch for arch in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_arch(model_type: str) -> Arch:
    """The site table of an architecture.

    model_type: `model_type` of the config, exactly.
    Raises `UnsupportedModel`, which lists the supported architectures.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}. "
            "To add one, write its table of sites in subnibble/arch"
        )
    return ARCHITECTURES[model_type]
