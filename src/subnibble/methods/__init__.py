"""All methods by name. To add one, write a file here that composes steps and add its `Method` to `METHODS`."""

from subnibble.errors import BadRecipe
from subnibble.methods.atom import ATOM
from subnibble.methods.awq import AWQ
from subnibble.methods.bisup import BISUP
from subnibble.methods.d2quant import D2QUANT
from subnibble.methods.d2quant_plus import D2QUANT_PLUS
from subnibble.methods.gptaq import GPTAQ
from subnibble.methods.gptq import GPTQ
from subnibble.methods.low_rank import L2QER, QERA
from subnibble.methods.method import Method
from subnibble.methods.none import NONE
from subnibble.methods.omniquant import OMNIQUANT
from subnibble.methods.quarot import QUAROT
from subnibble.methods.rtn import RTN
from subnibble.methods.serq import SERQ
from subnibble.methods.serq_plus import SERQ_PLUS
from subnibble.methods.smoothquant import SMOOTHQUANT

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        RTN,
        AWQ,
        GPTQ,
        GPTAQ,
        D2QUANT,
        D2QUANT_PLUS,
        SMOOTHQUANT,
        L2QER,
        QERA,
        QUAROT,
        SERQ,
        SERQ_PLUS,
        ATOM,
        OMNIQUANT,
        BISUP,
        NONE,
    )
}


def find_method(name: str) -> Method:
    """Return the method called `name`; raises `BadRecipe` with the known names if there is none."""
    if name not in METHODS:
        raise BadRecipe(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]
