"""Device and dtype of computation, by name."""

from __future__ import annotations

import psutil
import torch

from subnibble.arguments import plain
from subnibble.errors import BadRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


def resolve_device(name: str | torch.device) -> torch.device:
    """The torch device called `name`; `BadRecipe` if it cannot be used on this machine.

    name: a torch device or its name; "auto" is the accelerator if there is one, else the CPU.
    """
    name = plain(name)
    if name == AUTO:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise BadRecipe(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def resolve_dtype(name: str | torch.dtype, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in; `BadRecipe` for an unknown name.

    name: a key of `DTYPES`, or "auto": the checkpoint's dtype, except float32 for a float16 checkpoint on a CPU, where
        float16 is slow.
    stored: dtype of the checkpoint; None counts as float32.
    device: device that computes.
    """
    name = plain(name)
    if name == AUTO:
        slow = device.type == "cpu" and stored == torch.float16
        return torch.float32 if stored is None or slow else stored
    if name not in DTYPES:
        raise BadRecipe(f"dtype is {name!r}; choose one of {AUTO}, {', '.join(DTYPES)}")
    return DTYPES[name]


def free_memory(device: torch.device) -> int:
    """Free bytes on a CUDA device; for any other device, free bytes of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
