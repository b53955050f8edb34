"""Whether a checkpoint's tensors are those that its config asks for, in shape and type, known before any is read.

Where they are not, the error tells the cause: an adapter that was not merged, weights that another tool quantized, one
table where the config has two, another number of blocks; and what the file has instead. All of a checkpoint's files
are whole once it is open, so that fetching it again would not help.
"""

from __future__ import annotations

from collections.abc import Mapping

from subnibble.arch.site import Arch
from subnibble.checkpoint.source import Source
from subnibble.errors import CheckpointError
from subnibble.model.transformers_api.empty import stray_buffers

# Parts of the names that peft gives to what it adds, and to what it wraps.
_ADAPTER_PARTS = (
    ".lora_", ".base_layer.", ".modules_to_save.", ".original_module.", ".hada_", ".ia3_", ".oft_", ".vera_",
)  # fmt: skip
# Endings of what other tools store beside, or in place of, a quantized weight.
_QUANTIZED_ENDINGS = (
    ".qweight", ".qzeros", ".g_idx", ".scales", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_scale_2", ".weight_global_scale", ".weight_zero_point", ".input_scale", ".input_global_scale",
    ".scale_weight", ".scale_input", ".SCB", ".absmax", ".quant_map", ".nested_absmax", ".k_scale", ".v_scale",
)  # fmt: skip
_OURS = ".codes"
_CONFIG = "config.json"
_NO_MATCH = "config and weights do not belong together"


def check_fit(source: Source, shapes: Mapping[str, tuple[int, ...]], arch: Arch) -> None:
    """Raise `CheckpointError` unless `source` has just these tensors.

    shapes: of every weight that the model must have; a tied head is none of them.
    """
    there = set(source.names())
    missing = [name for name in shapes if name not in there]
    spare = there - set(shapes) - {f"{arch.head}.weight"}
    unplaced = sorted(spare - set(stray_buffers(spare)))
    tables = [f"{arch.embedding}.weight", f"{arch.head}.weight"]
    _check_plain(source, sorted(there))
    if len(missing) == 1 and missing[0] in tables:
        raise CheckpointError(_one_table(source, missing[0], tables))
    if missing:
        raise CheckpointError(
            f"{source.path}: tensor {missing[0]} is missing ({len(missing)} of {len(shapes)} in all), though "
            f"{source.described_by} asks for it; {_instead(source, unplaced, arch)}"
        )
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            rows = source.shape(name)[0]
            is_longer = name in tables and source.shape(name)[1:] == shape[1:]
            raise CheckpointError(
                f"{source.path}: {name} has shape {source.shape(name)} where {source.described_by} asks for {shape}; "
                + (f"its vocab_size is {shape[0]} and would be {rows}" if is_longer else _NO_MATCH)
            )
    if unplaced:
        raise CheckpointError(
            f"{source.path}: tensor {unplaced[0]} ({len(unplaced)} in all) has no place in a {arch.model_type} model "
            f"of this config; {_blocks(source, arch) or _NO_MATCH}"
        )
    for name in shapes:
        source.check_type(name)


def _check_plain(source: Source, names: list[str]) -> None:
    """Raise `CheckpointError` for what is not a model's own weights."""
    for name in names:
        if any(part in name for part in _ADAPTER_PARTS):
            raise CheckpointError(
                f"{source.path}: {name} is of an adapter that is not merged into the weights; merge it "
                "(merge_and_unload() in peft), save the model, and give that"
            )
        if name.endswith(_QUANTIZED_ENDINGS):
            raise CheckpointError(
                f"{source.path}: another tool quantized these weights ({name} is stored with them), though "
                f"{source.described_by} does not say so, and subnibble cannot read them; give it the original model"
            )
        if name.endswith(_OURS):
            raise CheckpointError(
                f"{source.path}: {name} is of a packed subnibble checkpoint, but its config.json has lost the "
                "quantization_config; put back the one that was written with it, or quantize the model again"
            )


def _one_table(source: Source, missing: str, tables: list[str]) -> str:
    """Why a model lacks its embedding or its head alone, and what its owner can do."""
    told = f"{source.path}: tensor {missing} is missing"
    tied, other = bool(source.config.tie_word_embeddings), tables[1 - tables.index(missing)]
    if tied or other not in source.names() or source.described_by != _CONFIG:
        return f"{told}, and nothing else is the model's table of tokens; whoever saved it left it out"
    return (
        f"{told}, and {_CONFIG} does not tie the head to the embedding; if {other} is both in this model, set "
        '"tie_word_embeddings": true in it. A decoder that was saved without its head is no language model'
    )


def _instead(source: Source, spare: list[str], arch: Arch) -> str:
    """What the file has in place of missing tensors."""
    if told := _blocks(source, arch):
        return told
    if spare:
        return f"the file has {spare[0]} instead ({len(spare)} names that are not a {arch.model_type} model's)"
    return "the file has nothing in its place: whoever saved it left it out"


def _blocks(source: Source, arch: Arch) -> str:
    """What is wrong with the number of blocks; nothing if it is that of the config."""
    prefix, asked = f"{arch.blocks}.", source.config.num_hidden_layers
    found = {name.removeprefix(prefix).partition(".")[0] for name in source.names() if name.startswith(prefix)}
    if not found or len(found) == asked:
        return ""
    return f"the file has {len(found)} blocks and {source.described_by} says {asked}: they are of two models"
