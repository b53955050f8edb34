"""The canonical content of a packed checkpoint: what is compared, whatever the package calls it and stores it in.

A content maps names to tensors and texts, in the order of the data's flow: `<module>/<part>`, `<module>` being the path
that transformers gives a module, or `config`, `cache` and `prefix`. Parts of a module:

    ranges                    text: of each column range its start, stop, bits, grid, group size, zero-point, scale type
    I/codes                   (rows, columns) uint8, unpacked, of range number I
    I/scales                  (rows, groups * scales a group) in the stored type; powers of two as float32
    I/zeros                   (rows, groups), whole ones uint8, unpacked; missing where the grid has none
    salient/..., low_rank/down/..., low_rank/up/...   the same of the salient matrix and the low-rank factors
    weight, bias              as stored: of norms, and of linears and tables that are not packed
    column_scale (k), gather (k) int64, hadamard (text: widths), activation (text), residual (text)
    tied                      text: path of the table that a head shares
    mix                       (d, d) float32, dense: what a rotated tied head's input meets
    prefix/keys, prefix/values (heads, tokens, width), key_center (heads, width), key_basis (text)

A part that is not there is missing, not empty. `read.py` makes contents; this file keeps and finds nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Content = dict[str, Tensor | str]

# Every kind of part, as `kind_of` has it.
_MATRIX = ("ranges", "codes", "scales", "zeros")
KINDS = frozenset({
    *_MATRIX, *(f"{name}/{part}" for name in ("salient", "low_rank/down", "low_rank/up") for part in _MATRIX),
    "weight", "bias", "column_scale", "gather", "hadamard", "activation", "residual", "tied", "mix", "prefix/keys",
    "prefix/values", "key_center", "key_basis", "config", "cache", "prefix", "norm bias",
})  # fmt: skip
# Modules in the order of the data's flow.
_FLOW = (
    "config", "cache", "prefix", "embed_tokens", "input_layernorm", "q_proj", "q_norm", "k_proj", "k_norm", "v_proj",
    "self_attn", "o_proj", "post_attention_layernorm", "gate_proj", "up_proj", "down_proj", "norm", "lm_head",
)  # fmt: skip


def ordered(content: Mapping[str, Tensor | str]) -> Content:
    """The same in canonical order; parts of a module keep theirs."""
    return {name: content[name] for name in sorted(content, key=_place)}


def save(content: Content, file: Path) -> None:
    """Write a content as `file`.json, which has its names and texts, and `file`.safetensors."""
    texts = [[name, part if isinstance(part, str) else None] for name, part in content.items()]
    file.with_suffix(".json").write_text(json.dumps(texts))
    tensors = {name: part.contiguous() for name, part in content.items() if isinstance(part, Tensor)}
    save_file(tensors, file.with_suffix(".safetensors"))


def load(file: Path) -> Content:
    """Inverse of `save`."""
    tensors = load_file(file.with_suffix(".safetensors"))
    texts = json.loads(file.with_suffix(".json").read_text())
    return {name: tensors[name] if text is None else text for name, text in texts}


def kind_of(name: str) -> str:
    """What kind of part a name is of: one of `KINDS`, numbers of ranges left out."""
    module, _, part = name.partition("/")
    if module in ("config", "cache", "prefix"):
        return module
    if part == "bias" and module.endswith("norm"):
        return "norm bias"
    return re.sub(r"(^|/)\d+/", r"\1", part)


def _place(name: str) -> tuple[int, int, int, str]:
    """Before the blocks, which block, or after them; and where in it."""
    path = name.partition("/")[0]
    block = re.search(r"\.layers\.(\d+)\.", path)
    last = path.rpartition(".")[2]
    flow = _FLOW.index(last) if last in _FLOW else len(_FLOW)
    if block is not None:
        return 1, int(block[1]), flow, path
    return (0 if flow <= _FLOW.index("embed_tokens") else 2), 0, flow, path
