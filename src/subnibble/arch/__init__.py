"""The supported architectures, by exact `config.model_type`."""

from subnibble.arch.llama import LLAMA
from subnibble.arch.mistral import MISTRAL
from subnibble.arch.qwen2 import QWEN2
from subnibble.arch.qwen3 import QWEN3
from subnibble.arch.site import Arch
from subnibble.errors import UnsupportedModel

ARCHITECTURES: dict[str, Arch] = {arch.model_type: arch for arch in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_arch(model_type: str) -> Arch:
    """The site table of `model_type`; `UnsupportedModel` lists the supported ones."""
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}. "
            "A new one is a table of sites in subnibble/arch"
        )
    return ARCHITECTURES[model_type]
