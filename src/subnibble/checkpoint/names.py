"""Map tensor names in a file to the model's names, which wrappers and other tools may have changed.

A compiled, sharded or wrapped module adds parts to the paths of its tensors. A multimodal model keeps its decoder in a
submodule. A bare decoder is saved without the prefix that the model gives it. The path before the first block's norm
shows the prefix. If the file has one decoder, its tensors get the model's names; if it has several, the file is
refused, since nothing says which one the config describes. If a tied model stores its table only under the head's name,
the table becomes the embedding, as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from subnibble.arch.site import Arch
from subnibble.errors import CheckpointError

# Path parts that torch.compile, FSDP, activation checkpointing and DDP add.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})


def model_names(stored: Iterable[str], arch: Arch, tied: bool, where: Path) -> dict[str, str]:
    """Return the name in the model -> the name in the file, for every stored tensor.

    stored: names in the file; names that are not changed map to themselves.
    arch: the architecture, which has the model's names.
    tied: whether the model's head is its embedding.
    where: the checkpoint, for errors.
    Raises `CheckpointError` if two tensors get the same name, or if the file has several decoders.
    """
    bare = {name: _unwrapped(name) for name in stored}
    model_root, root = arch.blocks.rpartition(".")[0] + ".", _root(set(bare.values()), arch, where)
    table, head = f"{arch.embedding}.weight", f"{arch.head}.weight"
    heads = [name for name in bare.values() if _ends(name, head)]
    names: dict[str, str] = {}
    for name, path in bare.items():
        new = head if heads == [path] else model_root + path.removeprefix(root) if path.startswith(root) else path
        if new in names:
            raise CheckpointError(
                f"{where}: {names[new]} and {name} are both {new}; save only the model that you want to quantize"
            )
        names[new] = name
    if tied and table not in names and head in names:
        names[table] = names.pop(head)
    return names


def _root(names: set[str], arch: Arch, where: Path) -> str:
    """Return the file's prefix of the decoder: the model's own prefix if the file has it, else the only one."""
    model_root, _, tail = arch.blocks.rpartition(".")
    first = f"{tail}.0.{arch.residual.norms[0]}.weight"
    roots = sorted(name.removesuffix(first) for name in names if _ends(name, first))
    if f"{model_root}." in roots or not roots:
        return f"{model_root}."
    if len(roots) > 1:
        raise CheckpointError(
            f"{where}: the file has {len(roots)} decoders ({roots[0] + first}, {roots[1] + first}), but config.json "
            "describes one; save only the one that you want to quantize"
        )
    return roots[0]


def _unwrapped(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _ends(name: str, ending: str) -> bool:
    """Whether a path ends in these whole parts."""
    return name == ending or name.endswith(f".{ending}")
