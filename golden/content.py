"""The canonical content of a packed checkpoint: what is compared, independent of file names, packing and shards.

A content maps names `<module>/<part>` to tensors and texts, in the order of the data flow. `<module>` is the path that
transformers gives a module, or `config`, `cache` or `prefix`. Parts of a module:

    ranges                    text: start, stop, bits, grid, group size, zero-point and scale type of each column range
    I/codes                   (rows, columns) uint8, unpacked, of range number I
    I/scales                  (rows, groups * scales per group) in the stored type; powers of two as float32
    I/zeros                   (rows, groups), integer ones uint8, unpacked; missing if the grid has none
    salient/..., low_rank/down/..., low_rank/up/...   the same for the salient matrix and the low-rank factors
    weight, bias              as stored: of norms, and of linears and tables that are not packed
    column_scale (k), gather (k) int64, hadamard (text: widths), activation (text), residual (text)
    tied                      text: path of the table that a head shares
    mix                       (d, d) float32, dense: the matrix before a rotated tied head
    prefix/keys, prefix/values (heads, tokens, width), key_center (heads, width), key_basis (text)

A part that a module does not have is missing, not empty. `read.py` reads contents from checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Content = dict[str, Tensor | str]

# Every kind of part that `kind_of` returns.
_MATRIX = ("ranges", "codes", "scales", "zeros")
KINDS = frozenset({
    *_MATRIX, *(f"{name}/{field}" for name in ("salient", "low_rank/down", "low_rank/up") for field in _MATRIX),
    "weight", "bias", "column_scale", "gather", "hadamard", "activation", "residual", "tied", "mix", "prefix/keys",
    "prefix/values", "key_center", "key_basis", "config", "cache", "prefix", "norm bias",
})  # fmt: skip
# Modules in the order of the data flow.
_FLOW = (
    "config", "cache", "prefix", "embed_tokens", "input_layernorm", "q_proj", "q_norm", "k_proj", "k_norm", "v_proj",
    "self_attn", "o_proj", "post_attention_layernorm", "gate_proj", "up_proj", "down_proj", "norm", "lm_head",
)  # fmt: skip


def ordered(content: Mapping[str, Tensor | str]) -> Content:
    """Return the content with its modules in canonical order; the parts of a module keep their order."""
    return {name: content[name] for name in sorted(content, key=_place)}


def save(content: Content, file: Path) -> None:
    """Write a content as `file`.json (all names, and the texts) and `file`.safetensors (the tensors)."""
    texts = [[name, tensor if isinstance(tensor, str) else None] for name, tensor in content.items()]
    file.with_suffix(".json").write_text(json.dumps(texts))
    tensors = {name: tensor.contiguous() for name, tensor in content.items() if isinstance(tensor, Tensor)}
    save_file(tensors, file.with_suffix(".safetensors"))


def load(file: Path) -> Content:
    """Read what `save` wrote to `file`."""
    tensors = load_file(file.with_suffix(".safetensors"))
    texts = json.loads(file.with_suffix(".json").read_text())
    return {name: tensors[name] if text is None else text for name, text in texts}


def kind_of(name: str) -> str:
    """Return the kind of the part with this name: one of `KINDS`, without numbers of ranges."""
    module, _, tensor_name = name.partition("/")
    if module in ("config", "cache", "prefix"):
        return module
    if tensor_name == "bias" and module.endswith("norm"):
        return "norm bias"
    return re.sub(r"(^|/)\d+/", r"\1", tensor_name)


def _place(name: str) -> tuple[int, int, int, str]:
    """Sort key: before the blocks (0), in a block (1) or after them (2); the block; the place in it; the path."""
    path = name.partition("/")[0]
    block = re.search(r"\.layers\.(\d+)\.", path)
    last = path.rpartition(".")[2]
    flow = _FLOW.index(last) if last in _FLOW else len(_FLOW)
    if block is not None:
        return 1, int(block[1]), flow, path
    return (0 if flow <= _FLOW.index("embed_tokens") else 2), 0, flow, path
