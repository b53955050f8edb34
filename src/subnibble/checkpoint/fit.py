"""Check, before any tensor is read, that a checkpoint's tensors match its config in name, shape and type.

If not, the error gives the cause: an unmerged adapter, weights that another tool quantized, an embedding without the
head that the config asks for, or another number of blocks. It also says what the file has instead. It does not advise a
new download: opening a checkpoint has already checked that its files are complete.
"""

from __future__ import annotations

from collections.abc import Mapping

from subnibble.arch.site import Arch
from subnibble.checkpoint.source import Source
from subnibble.errors import CheckpointError
from subnibble.model.transformers_api.empty import stray_buffers

# Parts of names that peft gives to the modules it adds or wraps.
_ADAPTER_PARTS = (
    ".lora_", ".base_layer.", ".modules_to_save.", ".original_module.", ".hada_", ".ia3_", ".oft_", ".vera_",
)  # fmt: skip
# Name endings of tensors that other tools store beside or instead of a quantized weight.
_QUANTIZED_ENDINGS = (
    ".qweight", ".qzeros", ".g_idx", ".scales", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_scale_2", ".weight_global_scale", ".weight_zero_point", ".input_scale", ".input_global_scale",
    ".scale_weight", ".scale_input", ".SCB", ".absmax", ".quant_map", ".nested_absmax", ".k_scale", ".v_scale",
)  # fmt: skip
_OURS = ".codes"
_CONFIG = "config.json"
_NO_MATCH = "config and weights do not belong together"


def check_fit(source: Source, shapes: Mapping[str, tuple[int, ...]], arch: Arch) -> None:
    """Raise `CheckpointError` unless `source` has exactly the tensors that the model needs.

    shapes: name -> shape of every weight that the model must have, without a tied head.
    arch: the model's table of sites, which names its embedding, head and blocks.
    """
    stored = set(source.names())
    missing = [name for name in shapes if name not in stored]
    extra = stored - set(shapes) - {f"{arch.head}.weight"}
    unplaced = sorted(extra - set(stray_buffers(extra)))
    tables = [f"{arch.embedding}.weight", f"{arch.head}.weight"]
    _check_plain(source, sorted(stored))
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
                + (f"its vocab_size is {shape[0]}, but the table has {rows} rows" if is_longer else _NO_MATCH)
            )
    if unplaced:
        raise CheckpointError(
            f"{source.path}: tensor {unplaced[0]} ({len(unplaced)} in all) has no place in a {arch.model_type} model "
            f"of this config; {_blocks(source, arch) or _NO_MATCH}"
        )
    for name in shapes:
        source.check_type(name)


def _check_plain(source: Source, names: list[str]) -> None:
    """Raise `CheckpointError` if tensors belong to an adapter or to a quantized model."""
    for name in names:
        if any(word in name for word in _ADAPTER_PARTS):
            raise CheckpointError(
                f"{source.path}: {name} belongs to an adapter that is not merged into the weights; merge it "
                "(merge_and_unload() in peft), save the model, and give the saved model"
            )
        if name.endswith(_QUANTIZED_ENDINGS):
            raise CheckpointError(
                f"{source.path}: another tool quantized these weights ({name} is stored with them), though "
                f"{source.described_by} does not say so, and subnibble cannot read them; give it the original model"
            )
        if name.endswith(_OURS):
            raise CheckpointError(
                f"{source.path}: {name} belongs to a packed subnibble checkpoint, but its config.json has lost the "
                "quantization_config; restore the config.json that was written with it, or quantize the model again"
            )


def _one_table(source: Source, missing: str, tables: list[str]) -> str:
    """Say why only the embedding or only the head is missing, and what to do."""
    problem = f"{source.path}: tensor {missing} is missing"
    tied, other = bool(source.config.tie_word_embeddings), tables[1 - tables.index(missing)]
    if tied or other not in source.names() or source.described_by != _CONFIG:
        return f"{problem}, and no other tensor is the model's token table; give a checkpoint that was saved with it"
    return (
        f"{problem}, and {_CONFIG} does not tie the head to the embedding; if this model uses {other} for both, set "
        '"tie_word_embeddings": true in it. A decoder that was saved without its head is no language model'
    )


def _instead(source: Source, unplaced: list[str], arch: Arch) -> str:
    """Say what the file has in place of missing tensors."""
    if problem := _blocks(source, arch):
        return problem
    if unplaced:
        return f"the file has {unplaced[0]} instead ({len(unplaced)} names that no {arch.model_type} model has)"
    return "the file has nothing in its place: give a checkpoint that was saved with it"


def _blocks(source: Source, arch: Arch) -> str:
    """Say what is wrong with the number of blocks; empty if it matches the config."""
    prefix, expected = f"{arch.blocks}.", source.config.num_hidden_layers
    blocks = {name.removeprefix(prefix).partition(".")[0] for name in source.names() if name.startswith(prefix)}
    if not blocks or len(blocks) == expected:
        return ""
    return f"the file has {len(blocks)} blocks and {source.described_by} says {expected}: they are of two models"
