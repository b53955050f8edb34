"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v. An edit of their rows edits the biases, too."""

from subnibble.arch.llama import LLAMA
from subnibble.arch.site import Arch

QWEN2 = Arch("qwen2", sites=LLAMA.sites, residual=LLAMA.residual)
