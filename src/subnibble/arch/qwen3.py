"""Qwen3: Llama's block with a norm on each head's queries and keys.

Those norms lie behind q_proj and k_proj, of whose rows edits move whole heads at most; the value path has none.
"""

from subnibble.arch.llama import LLAMA
from subnibble.arch.site import Arch

QWEN3 = Arch("qwen3", sites=LLAMA.sites, residual=LLAMA.residual)
