"""Read a packed checkpoint (docs/format.md, version 1) as the canonical content of `content.py`.

It knows the written format alone and imports nothing of the package, so that what is renamed inside is no matter. A
commit that changes the format changes this file with it: each side of a comparison is read by its own. Whatever it does
not know, a tensor or a key, is an error: what is not read is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

Content = dict[str, Tensor | str]

_CONFIG_KEYS = {"quant_method", "format_version", "schemes", "activations", "cache", "prefix", "modules", "sha256"}
# Of config.json: names the writer, or is no part of the model.
_NOT_COMPARED = {"quantization_config", "transformers_weights", "transformers_version", "_name_or_path"}


# What a linear does to its input, which another reader may store for it.
_OF_INPUT = {"column_scale", "gather", "hadamard", "activation", "residual"}


class UnreadContentError(Exception):
    """Something in a checkpoint that this reader does not know."""


def read(folder: Path) -> Content:
    """The content of the packed checkpoint in `folder`, in no particular order of modules."""
    config = json.loads((folder / "config.json").read_text())
    return content_of(config, stored_in(folder))


def stored_in(folder: Path) -> dict[str, Tensor]:
    """All stored tensors by name."""
    return {name: part for file in sorted(folder.glob("*.safetensors")) for name, part in load_file(file).items()}


def content_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Content:
    """The content of what config.json says and weight files hold."""
    stored = dict(tensors)
    packed = config.get("quantization_config") or {"schemes": {}, "modules": {}}
    if unknown := set(packed) - _CONFIG_KEYS:
        raise UnreadContentError(f"quantization_config has keys {sorted(unknown)}")
    content: Content = {
        f"config/{key}": _text(value) for key, value in sorted(config.items()) if key not in _NOT_COMPARED
    }
    if packed.get("cache") is not None:
        content["cache/scheme"] = _text({"key_center": "none", **packed["cache"]})
    if packed.get("prefix") is not None:
        content["prefix/ids"] = _text(packed["prefix"])
    labels = _Labels(packed["schemes"], packed.get("activations", {}))
    modules = _with_inputs(packed["modules"], stored)
    for path, entry in modules.items():
        content |= _module(path, dict(entry), stored, labels)
    biased = {path for path, entry in packed["modules"].items() if entry["kind"] == "norm_bias"}
    for name in sorted(stored):
        path, _, part = name.rpartition(".")
        if part == "bias" and path.endswith("norm") and path not in biased:
            raise UnreadContentError(f"{path} has a bias that config.json does not name")
        if part not in ("weight", "bias"):
            raise UnreadContentError(f"tensor {name} belongs to nothing that config.json names")
        content[f"{path}/{part}"] = stored[name]
    return content


def _with_inputs(modules: Mapping[str, Any], stored: dict[str, Tensor]) -> dict[str, Any]:
    """Modules, those that enter as another does with its keys; `stored` gets copies of its tensors for them."""
    found = {path: dict(entry) for path, entry in modules.items()}
    for path, entry in found.items():
        source = entry.pop("input", None)
        if source is None:
            continue
        if own := _OF_INPUT & entry.keys():
            raise UnreadContentError(f"{path} enters as {source} and has {sorted(own)}")
        entry |= {key: modules[source][key] for key in _OF_INPUT & modules[source].keys()}
        stored |= {f"{path}.{key}": stored[f"{source}.{key}"] for key in ("gather", "column_scale") if key in entry}
    return found


class _Labels:
    """What labels of schemes and activations stand for."""

    def __init__(self, schemes: Mapping[str, Any], activations: Mapping[str, Any]) -> None:
        self.schemes, self.activations = schemes, activations


def _module(path: str, entry: dict[str, Any], stored: dict[str, Tensor], labels: _Labels) -> Content:
    """The parts of a module that config.json names; their tensors are taken out of `stored`, but for plain ones."""
    kind = entry.pop("kind")
    found: Content = {}
    match kind:
        case "linear" | "embedding":
            rows = entry.pop("rows")
            found = _matrix(f"{path}/", f"{path}.", rows, entry.pop("ranges"), stored, labels)
            found |= _terms(path, kind, rows, entry, stored, labels)
        case "tied_head":
            found[f"{path}/tied"] = entry.pop("table")
        case "norm_bias":
            # The bias is a plain tensor of its name.
            if stored[f"{path}.bias"].shape != (entry.pop("rows"),):
                raise UnreadContentError(f"{path} has a bias of another width")
        case "input_mix":
            matrix, widths = stored.pop(f"{path}.matrix"), entry.pop("widths")
            blocks = [rows[:, :width] for rows, width in zip(matrix.split(widths), widths, strict=True)]
            found[f"{path.removesuffix('.mix')}/mix"] = torch.block_diag(*blocks)
        case "prefix":
            shape = tuple(entry.pop(key) for key in ("heads", "tokens", "width"))
            for name in ("keys", "values"):
                found[f"{path}/prefix/{name}"] = _of_shape(stored, f"{path}.prefix.{name}", shape)
        case "key_center":
            attention, shape = path.removesuffix(".key_center"), (entry.pop("heads"), entry.pop("width"))
            found[f"{attention}/key_center"] = _of_shape(stored, f"{path}.mean", shape)
            found[f"{attention}/key_basis"] = _text({key: entry.pop(key) for key in ("rope", "key_rotation")})
        case _:
            raise UnreadContentError(f"{path} is of the kind {kind!r}")
    if entry:
        raise UnreadContentError(f"{path} has keys {sorted(entry)}")
    return found


def _terms(
    path: str, kind: str, rows: int, entry: dict[str, Any], stored: dict[str, Tensor], labels: _Labels
) -> Content:
    """What a packed linear has beside its weight."""
    found: Content = {}
    if kind != "embedding" and entry.pop("bias") != (f"{path}.bias" in stored):
        raise UnreadContentError(f"{path} has a bias where it should not, or has none")
    if entry.pop("column_scale", False):
        found[f"{path}/column_scale"] = stored.pop(f"{path}.column_scale")
    if entry.pop("gather", False):
        found[f"{path}/gather"] = stored.pop(f"{path}.gather").long()
    if widths := entry.pop("hadamard", []):
        found[f"{path}/hadamard"] = _text(widths)
    if (label := entry.pop("activation", None)) is not None:
        found[f"{path}/activation"] = _text({"outliers": 0, **labels.activations[label]})
    if (ranges := entry.pop("salient", None)) is not None:
        found |= _matrix(f"{path}/salient/", f"{path}.salient.", rows, ranges, stored, labels)
    if (residual := entry.pop("residual", "none")) != "none":
        found[f"{path}/residual"] = residual
    if (branch := entry.pop("low_rank", None)) is not None:
        rank = branch["rank"]
        found |= _matrix(f"{path}/low_rank/down/", f"{path}.down.", rank, branch["down"], stored, labels)
        found |= _matrix(f"{path}/low_rank/up/", f"{path}.up.", rows, branch["up"], stored, labels)
    return found


def _matrix(
    name: str, prefix: str, rows: int, ranges: list[Any], stored: dict[str, Tensor], labels: _Labels
) -> Content:
    """A packed matrix. name: of its parts in the content. prefix: of its tensors."""
    found: Content = {}
    described, start = [], 0
    for index, (columns, label) in enumerate(ranges):
        scheme = dict(labels.schemes[label])
        described.append({"start": start, "stop": start + columns, **scheme})
        start += columns
        ending = f"_{index}" if index else ""
        groups = 1 if scheme["group_size"] == -1 else -(-columns // scheme["group_size"])
        codes = unpacked(stored.pop(f"{prefix}codes{ending}"), scheme["bits"], columns)
        if codes.shape[0] != rows:
            raise UnreadContentError(f"{prefix}codes{ending} has {codes.shape[0]} rows, not {rows}")
        scales = stored.pop(f"{prefix}scales{ending}")
        found[f"{name}{index}/codes"] = codes
        found[f"{name}{index}/scales"] = torch.exp2(scales.float() - 127) if scheme["scale_type"] == "e8m0" else scales
        if scheme["zero_point"] != "none":
            zeros = stored.pop(f"{prefix}zeros{ending}")
            whole = scheme["zero_point"] == "integer"
            found[f"{name}{index}/zeros"] = unpacked(zeros, scheme["bits"], groups) if whole else zeros
    return {f"{name}ranges": _text(described), **found}


def unpacked(stream: Tensor, bits: int, count: int) -> Tensor:
    """Codes (m, count) uint8 of a bit stream (m, bytes) uint8, least significant bit first."""
    found = np.unpackbits(stream.numpy(), axis=1, bitorder="little")[:, : count * bits]
    worth = (1 << np.arange(bits)).astype(np.uint8)
    return torch.from_numpy((found.reshape(-1, count, bits) * worth).sum(-1, dtype=np.uint8))


def _of_shape(stored: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = stored.pop(name)
    if tensor.shape != shape:
        raise UnreadContentError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    return tensor


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
