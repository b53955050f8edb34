"""Read tensors that accelerate keeps on disk or in another memory, outside the forward of the module that owns them.

accelerate's hook loads a module's tensors for that module's own forward, unloads them afterwards and leaves them on the
meta device. Some reads come before or after that forward: a head reads the embedding's table, and a bias is added after
a norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

from torch import Tensor, nn


def has_hook(module: nn.Module) -> bool:
    """Whether accelerate loads and unloads the module's tensors."""
    return "_hf_hook" in module.__dict__


def resident(module: nn.Module) -> AbstractContextManager[None]:
    """Context in which the module's own tensors are loaded; a tensor taken from it stays readable afterwards."""
    if not has_hook(module) or not any(tensor.is_meta for tensor in own_tensors(module)):
        return nullcontext()
    from accelerate.utils import align_module_device

    loaded: AbstractContextManager[None] = align_module_device(module)
    return loaded


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the module itself, without its submodules."""
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))
