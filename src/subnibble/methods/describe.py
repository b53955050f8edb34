"""What a method's options mean, as `subnibble list METHOD` shows it: from the docstrings that define them.

An option is described by an entry `name: text` in the docstring of the method's options, or of a base class of them.
If the entry just says where to look ("see `rounding/gptq.py`"), the text is that of the class there (`_SOURCES`).
"""

from __future__ import annotations

import re
from dataclasses import fields

from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.tuning.tuning import Tuning

_SOURCES = (*WeightOptions.__mro__, GPTQ, Asymmetry, Tuning, Steps)
# A line that begins an entry: one or more names, then the text.
_ENTRY = re.compile(r"(?P<names>[a-z]\w*(?:, [a-z]\w*)*): (?P<text>.*)")
_REFERENCE = re.compile(r",? \(?see `[^`]*`(?: (?:in|and) `[^`]*`)*\)?")


def meanings(method: Method) -> dict[str, str]:
    """Option of `method` -> what it means, in one line without a full stop; "" for an option without description."""
    return {item.name: _meaning(item.name, method.options) for item in fields(method.options)}


def _meaning(option: str, options: type) -> str:
    for documented in (*options.__mro__, *_SOURCES):
        text = _REFERENCE.sub("", f" {_entries(documented.__doc__ or '').get(option, '')}")
        first = re.split(r"(?<=\.) ", text.strip())[0].removesuffix(".")
        if first:
            return first
    return ""


def _entries(doc: str) -> dict[str, str]:
    """Name -> text of each entry of a docstring. The text runs to the first line that is not indented further."""
    entries: dict[str, str] = {}
    names: list[str] = []
    depth = 0
    for line in doc.splitlines():
        indent = len(line) - len(line.lstrip())
        entry = _ENTRY.fullmatch(line.strip())
        if names and line.strip() and indent > depth:
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
        elif entry is not None:
            names, depth = entry["names"].split(", "), indent
            entries |= dict.fromkeys(names, entry["text"])
        else:
            names = []
    return entries
