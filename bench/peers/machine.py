"""The processor that a row was measured on."""

from __future__ import annotations

from pathlib import Path

# Instructions that decide which kernels run, as Linux calls them.
_NAMED = ("avx2", "avx_vnni", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16", "gfni", "amx_int8")


def processor() -> dict[str, str]:
    """Return the processor's name (with family and model, because hosts hide the name) and its instructions."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    flags = facts.get("flags", "").split()
    name = f"{facts.get('model name', '')} ({facts.get('cpu family', '')}/{facts.get('model', '')})"
    return {"cpu": name, "instructions": " ".join(one for one in _NAMED if one in flags)}
