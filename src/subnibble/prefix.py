"""A system prompt for a model that is there already: its keys and values as the model itself makes them, at 16 bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from subnibble.cache_scheme import CacheScheme, PrefixIds
from subnibble.calibrate.windows import check_positions
from subnibble.checkpoint.packed import PREFIX_KEYS, PREFIX_VALUES, Entry, PrefixEntry, packed_config_of
from subnibble.checkpoint.safetensors_source import INDEX
from subnibble.checkpoint.size import measure, weights_hash
from subnibble.checkpoint.source import open_source
from subnibble.checkpoint.writer import CheckpointWriter
from subnibble.errors import CheckpointError, NumericalFailure
from subnibble.hf import load_model
from subnibble.hf_cache import attach_cache_, attached_cache, detach_cache_, set_prefix_
from subnibble.model.arch import find_arch
from subnibble.prompt import prefix_ids


def attach_prefix_(model: Any, scheme: CacheScheme | None, prefix: PrefixIds | None) -> None:
    """Put a transformers model, packed or plain, on a KV cache of `scheme` and behind `prefix`.

    The prefix's keys and values are the model's own, computed here, as float16. What was attached before is replaced.
    """
    if prefix is None:
        attach_cache_(model, scheme)
        return
    states = compute_prefix(model, prefix)
    attach_cache_(model, scheme, prefix)
    set_prefix_(model, [keys for keys, _ in states], [values for _, values in states])


def compute_prefix(model: Any, prefix: PrefixIds) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (heads, tokens, width) float16 of each layer. The model's own cache and prefix are dropped."""
    detach_cache_(model)
    check_positions(1, model.config, len(prefix.ids))
    cache = DynamicCache()
    device = next(iter((*model.parameters(), *model.buffers()))).device
    decoder = model.get_submodule(find_arch(model.config.model_type).blocks.rpartition(".")[0])
    with torch.inference_mode():
        decoder(torch.tensor([prefix.ids], device=device), past_key_values=cache, use_cache=True)
    # Without a config the cache has no sliding layers, which would keep the last tokens alone.
    layers: list[Any] = list(cache.layers)
    states = [(layer.keys[0].to(torch.float16), layer.values[0].to(torch.float16)) for layer in layers]
    if not all(bool(part.isfinite().all()) for pair in states for part in pair):
        raise NumericalFailure("keys or values of the system prompt do not fit float16; use another prompt")
    return states


def add_prefix(folder: str | Path, prompt: str, *, dtype: str = "float32", device: str = "auto") -> PrefixIds:
    """Give a packed checkpoint the system prompt `prompt` (`prompt.py`), in the place of one that it has.

    Its keys and values are those of the packed model; `quantize` with a system prompt stores the unquantized one's. The
    folder is replaced in one step; recipe.toml and whatever else is in it stays as it is.
    """
    source = open_source(folder)
    packed = packed_config_of(source.config)
    if packed is None:
        raise CheckpointError(
            f"{source.path} is no subnibble checkpoint; quantize the model first (--method none keeps its weights)"
        )
    prefix = prefix_ids(prompt, source.load_tokenizer())
    states = compute_prefix(load_model(source, dtype, device), prefix)
    arch = find_arch(source.config.model_type)
    paths = [f"{arch.block_path(index)}.{arch.attention}" for index in range(len(states))]
    modules: dict[str, Entry] = {p: entry for p, entry in packed.modules.items() if not isinstance(entry, PrefixEntry)}
    modules |= {path: PrefixEntry(*keys.shape) for path, (keys, _) in zip(paths, states, strict=True)}
    tensors = {f"{path}.{PREFIX_KEYS}": keys for path, (keys, _) in zip(paths, states, strict=True)}
    tensors |= {f"{path}.{PREFIX_VALUES}": values for path, (_, values) in zip(paths, states, strict=True)}
    shards = sorted(source.path.glob("*.safetensors"))
    with CheckpointWriter(source.path, len(shards) + 1, replace=True) as writer:
        for file in shards:
            kept = {name: part for name, part in load_file(file).items() if not _of_prefix(name)}
            writer.write_shard(kept)
        writer.write_shard(tensors)
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = replace(packed, modules=modules, prefix=prefix).to_dict()
        writer.write_json("config.json", config)
        writer.finish_weights()
        _copy_others(source.path, writer)
        writer.commit()
    return prefix


def _of_prefix(name: str) -> bool:
    return name.rpartition(".")[2] in (PREFIX_KEYS, PREFIX_VALUES)


def _copy_others(folder: Path, writer: CheckpointWriter) -> None:
    """What else is in the folder as it is, but for the report, which gets the new size and hash."""
    report = folder / "report.json"
    for item in folder.iterdir():
        if item.suffix == ".safetensors" or item.name in ("config.json", INDEX, report.name):
            continue
        copy = shutil.copytree if item.is_dir() else shutil.copy2
        copy(item, writer.folder / item.name)
    if report.is_file():
        values = json.loads(report.read_text(encoding="utf-8"))
        values["size"] = measure(open_source(writer.folder)).to_dict()
        values["weights_sha256"] = weights_hash(writer.folder)
        writer.write_json("report.json", values)


def same_prefix_(model: Any, other: Any) -> None:
    """Put `other` behind the prompt that `model` is behind, computed by itself, so that the two can be compared."""
    attached, theirs = attached_cache(model), attached_cache(other)
    prefix = None if attached is None else attached.prefix
    if prefix is not None and (theirs is None or theirs.prefix != prefix):
        attach_prefix_(other, None if theirs is None else theirs.scheme, prefix)
