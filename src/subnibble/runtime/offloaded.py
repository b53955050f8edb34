"""Tensors that accelerate keeps on disk or in another memory, for who reads them beside the module that owns them.

Its hook brings a module's tensors for that module's own forward and takes them away again, and leaves tensors on the
meta device. A head that reads the embedding's table, or a bias that is added after a norm, comes before or after that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

from torch import Tensor, nn


def has_hook(module: nn.Module) -> bool:
    """Whether accelerate brings the module's tensors and takes them away."""
    return "_hf_hook" in module.__dict__


def resident(module: nn.Module) -> AbstractContextManager[None]:
    """Within it the module's own tensors are there to be read; they stay readable for who holds them."""
    if not has_hook(module) or not any(tensor.is_meta for tensor in own_tensors(module)):
        return nullcontext()
    from accelerate.utils import align_module_device

    found: AbstractContextManager[None] = align_module_device(module)
    return found


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the module itself."""
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))
