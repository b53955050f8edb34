"""Read a packed checkpoint (docs/format.md, version 1) as the canonical content of `content.py`.

It depends on the stored format only and imports nothing from the package, so renames inside the package do not affect
it. A commit that changes the format must change this file with it, because each side of a comparison is read by the
file of its own tree. An unknown tensor or key is an error, because what is not read is not compared.
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
# Keys of config.json that name the writer or are no part of the model.
_NOT_COMPARED = {"quantization_config", "transformers_weights", "transformers_version", "_name_or_path"}
# Keys for what a linear does to its input. With `input`, another linear stores them.
_INPUT_KEYS = {"column_scale", "gather", "hadamard", "activation", "residual"}


class UnreadContentError(Exception):
    """A checkpoint has something that this reader does not know."""


def read(folder: Path) -> Content:
    """Return the content of the packed checkpoint in `folder`, with its modules in no particular order."""
    config = json.loads((folder / "config.json").read_text())
    return content_of(config, stored_in(folder))


def stored_in(folder: Path) -> dict[str, Tensor]:
    """Return all stored tensors, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def content_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Content:
    """Return the content of a checkpoint. config: its config.json. tensors: all stored tensors, by name."""
    stored = dict(tensors)
    packed = config.get("quantization_config") or {"schemes": {}, "modules": {}}
    if unknown := set(packed) - _CONFIG_KEYS:
        raise UnreadContentError(f"quantization_config has unknown keys {sorted(unknown)}")
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
        path, _, tensor_name = name.rpartition(".")
        if tensor_name == "bias" and path.endswith("norm") and path not in biased:
            raise UnreadContentError(f"{path} has a bias that config.json does not list")
        if tensor_name not in ("weight", "bias"):
            raise UnreadContentError(f"tensor {name} belongs to nothing that config.json lists")
        content[f"{path}/{tensor_name}"] = stored[name]
    return content


def _with_inputs(modules: Mapping[str, Any], stored: dict[str, Tensor]) -> dict[str, Any]:
    """Return the modules with `input` resolved: the other linear's input keys are copied into their entries.

    `stored` gets copies of the other linear's tensors.
    """
    resolved = {path: dict(entry) for path, entry in modules.items()}
    for path, entry in resolved.items():
        source = entry.pop("input", None)
        if source is None:
            continue
        if extra := _INPUT_KEYS & entry.keys():
            raise UnreadContentError(f"{path} uses the input of {source} and also has {sorted(extra)}")
        entry |= {key: modules[source][key] for key in _INPUT_KEYS & modules[source].keys()}
        stored |= {f"{path}.{key}": stored[f"{source}.{key}"] for key in ("gather", "column_scale") if key in entry}
    return resolved


class _Labels:
    """The schemes and activation schemes of a checkpoint, by label."""

    def __init__(self, schemes: Mapping[str, Any], activations: Mapping[str, Any]) -> None:
        self.schemes, self.activations = schemes, activations


def _module(path: str, entry: dict[str, Any], stored: dict[str, Tensor], labels: _Labels) -> Content:
    """Return the parts of a module in config.json, and remove their tensors, except plain ones, from `stored`."""
    kind = entry.pop("kind")
    parts: Content = {}
    match kind:
        case "linear" | "embedding":
            rows = entry.pop("rows")
            parts = _matrix(f"{path}/", f"{path}.", rows, entry.pop("ranges"), stored, labels)
            parts |= _terms(path, kind, rows, entry, stored, labels)
        case "tied_head":
            parts[f"{path}/tied"] = entry.pop("table")
        case "norm_bias":
            # The bias itself is read as a plain tensor.
            if stored[f"{path}.bias"].shape != (entry.pop("rows"),):
                raise UnreadContentError(f"{path}.bias has a shape other than `rows`")
        case "input_mix":
            matrix, widths = stored.pop(f"{path}.matrix"), entry.pop("widths")
            blocks = [rows[:, :width] for rows, width in zip(matrix.split(widths), widths, strict=True)]
            parts[f"{path.removesuffix('.mix')}/mix"] = torch.block_diag(*blocks)
        case "prefix":
            shape = tuple(entry.pop(key) for key in ("heads", "tokens", "width"))
            for name in ("keys", "values"):
                parts[f"{path}/prefix/{name}"] = _of_shape(stored, f"{path}.prefix.{name}", shape)
        case "key_center":
            attention, shape = path.removesuffix(".key_center"), (entry.pop("heads"), entry.pop("width"))
            parts[f"{attention}/key_center"] = _of_shape(stored, f"{path}.mean", shape)
            parts[f"{attention}/key_basis"] = _text({key: entry.pop(key) for key in ("rope", "key_rotation")})
        case _:
            raise UnreadContentError(f"{path} is of the unknown kind {kind!r}")
    if entry:
        raise UnreadContentError(f"{path} has unknown keys {sorted(entry)}")
    return parts


def _terms(
    path: str, kind: str, rows: int, entry: dict[str, Any], stored: dict[str, Tensor], labels: _Labels
) -> Content:
    """Return the parts of a packed linear other than its weight, and remove their tensors from `stored`."""
    parts: Content = {}
    if kind != "embedding" and entry.pop("bias") != (f"{path}.bias" in stored):
        raise UnreadContentError(f"{path}: config.json and the weight files disagree about its bias")
    if entry.pop("column_scale", False):
        parts[f"{path}/column_scale"] = stored.pop(f"{path}.column_scale")
    if entry.pop("gather", False):
        parts[f"{path}/gather"] = stored.pop(f"{path}.gather").long()
    if widths := entry.pop("hadamard", []):
        parts[f"{path}/hadamard"] = _text(widths)
    if (label := entry.pop("activation", None)) is not None:
        parts[f"{path}/activation"] = _text({"outliers": 0, **labels.activations[label]})
    if (ranges := entry.pop("salient", None)) is not None:
        parts |= _matrix(f"{path}/salient/", f"{path}.salient.", rows, ranges, stored, labels)
    if (residual := entry.pop("residual", "none")) != "none":
        parts[f"{path}/residual"] = residual
    if (branch := entry.pop("low_rank", None)) is not None:
        rank = branch["rank"]
        parts |= _matrix(f"{path}/low_rank/down/", f"{path}.down.", rank, branch["down"], stored, labels)
        parts |= _matrix(f"{path}/low_rank/up/", f"{path}.up.", rows, branch["up"], stored, labels)
    return parts


def _matrix(
    name: str, prefix: str, rows: int, ranges: list[Any], stored: dict[str, Tensor], labels: _Labels
) -> Content:
    """Return the parts of a packed matrix. name: start of their names in the content. prefix: of the tensors' names."""
    parts: Content = {}
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
        parts[f"{name}{index}/codes"] = codes
        parts[f"{name}{index}/scales"] = torch.exp2(scales.float() - 127) if scheme["scale_type"] == "e8m0" else scales
        if scheme["zero_point"] != "none":
            zeros = stored.pop(f"{prefix}zeros{ending}")
            is_packed = scheme["zero_point"] == "integer"
            parts[f"{name}{index}/zeros"] = unpacked(zeros, scheme["bits"], groups) if is_packed else zeros
    return {f"{name}ranges": _text(described), **parts}


def unpacked(stream: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes (m, count) uint8 of a bit stream (m, bytes) uint8, least significant bit first."""
    stream_bits = np.unpackbits(stream.numpy(), axis=1, bitorder="little")[:, : count * bits]
    place_values = (1 << np.arange(bits)).astype(np.uint8)
    return torch.from_numpy((stream_bits.reshape(-1, count, bits) * place_values).sum(-1, dtype=np.uint8))


def _of_shape(stored: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = stored.pop(name)
    if tensor.shape != shape:
        raise UnreadContentError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    return tensor


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
