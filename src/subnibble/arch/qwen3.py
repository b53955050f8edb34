"""Qwen3: Llama's block with a norm on the queries and keys of each head.

The norms come after q_proj and k_proj. They allow our edits, which only move whole heads of the rows of q_proj and
k_proj. The value path has no such norm.
"""

from subnibble.arch.llama import LLAMA
from subnibble.arch.site import Arch

QWEN3 = Arch("qwen3", sites=LLAMA.sites, residual=LLAMA.residual)
