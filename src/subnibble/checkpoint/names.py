"""Under which names a file holds a model's tensors, where wrappers and tools have changed the model's own.

A compiled, sharded or wrapped module adds parts to its tensors' paths, a multimodal model keeps its decoder in a
submodule, and a bare decoder is saved without the name that the model gives it. What is before the first block's norm
tells which it was: where the file has one decoder, its tensors get the model's names; where it has several, nothing
says which one the config describes. A table that is stored under the head's name alone is the embedding's of a model
that ties them, as transformers has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from subnibble.arch.site import Arch
from subnibble.errors import CheckpointError

# What torch.compile, FSDP, activation checkpointing and DDP put into paths.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})


def model_names(stored: Iterable[str], arch: Arch, tied: bool, where: Path) -> dict[str, str]:
    """Name in the model -> name in the file, of every stored tensor; what has no other name keeps its own.

    tied: whether the model's head is its embedding. where: names the checkpoint in errors.
    """
    bare = {name: _unwrapped(name) for name in stored}
    own, root = arch.blocks.rpartition(".")[0] + ".", _root(set(bare.values()), arch, where)
    table, head = f"{arch.embedding}.weight", f"{arch.head}.weight"
    heads = [name for name in bare.values() if _ends(name, head)]
    found: dict[str, str] = {}
    for name, path in bare.items():
        new = head if heads == [path] else own + path.removeprefix(root) if path.startswith(root) else path
        if new in found:
            raise CheckpointError(f"{where}: {found[new]} and {name} are both {new}; save the model to quantize alone")
        found[new] = name
    if tied and table not in found and head in found:
        found[table] = found.pop(head)
    return found


def _root(names: set[str], arch: Arch, where: Path) -> str:
    """What the file calls the decoder: the model's own name for it if that is there, else the only one."""
    own, _, tail = arch.blocks.rpartition(".")
    first = f"{tail}.0.{arch.residual.norms[0]}.weight"
    roots = sorted(name.removesuffix(first) for name in names if _ends(name, first))
    if f"{own}." in roots or not roots:
        return f"{own}."
    if len(roots) > 1:
        raise CheckpointError(
            f"{where}: the file has {len(roots)} decoders ({roots[0] + first}, {roots[1] + first}), where config.json "
            "describes one; save the one to quantize alone"
        )
    return roots[0]


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _ends(name: str, ending: str) -> bool:
    """Whether a path ends in these parts."""
    return name == ending or name.endswith(f".{ending}")
