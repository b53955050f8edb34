"""What the bytes of a run's result depend on. A run is resumed only where all of it is as it was."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import subnibble
from subnibble.kernels import native
from subnibble.version import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "numpy")
_SHOWN = 120


def files(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Path -> [size in bytes, time of change in ns] of each file.

    Contents are not read for this: reading the weights would take as long as quantizing to nearest.
    """
    states = {str(path): path.stat() for path in paths}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def tokens(windows: Tensor | None) -> str | None:
    """SHA-256 of token ids, None without: the text, the tokenizer and the draw of windows in one number."""
    if windows is None:
        return None
    ids = windows.detach().cpu().contiguous()
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()


def versions() -> dict[str, str]:
    """Package -> release; for subnibble, with a digest of its source code."""
    return {"subnibble": f"{__version__}+{_code()}", **{name: version(name) for name in _PACKAGES}}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine's properties that change the order of sums: processor, threads, accelerator, precision, kernels."""
    return {
        "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "float32 products": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "kernels": native.isa(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint as it comes back from JSON, for example with lists in place of tuples."""
    values: dict[str, Any] = json.loads(json.dumps(fingerprint))
    return values


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A short name for a fingerprint, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(plain(fingerprint), sort_keys=True).encode()).hexdigest()[:16]


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two fingerprints, as "recipe.bits was 3 and is 4"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [*then, *(key for key in now if key not in then)]
        inner = (differences(then.get(key), now.get(key), f"{where}.{key}" if where else str(key)) for key in keys)
        return [line for lines in inner for line in lines]
    return [] if then == now else [f"{where} was {_short(then)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@cache
def _processor() -> str:
    """Name of the processor with a digest of its features: libraries choose their code by all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # The first processor; the others are listed after it in the same form.
    pairs = (line.partition(":") for line in reversed(lines))
    values = {key.strip(): value.strip() for key, _, value in pairs}
    features = sorted((values.get("flags") or values.get("Features") or "").split())
    name = values.get("model name", platform.processor())
    return f"{platform.machine()} {name} {hashlib.sha256(' '.join(features).encode()).hexdigest()[:8]}"


@cache
def _code() -> str:
    """A digest over all source files of the package, so that no run mixes two states of the code."""
    total, root = hashlib.sha256(), Path(subnibble.__file__).parent
    for file in sorted(root.rglob("*.py")):
        total.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:12]
