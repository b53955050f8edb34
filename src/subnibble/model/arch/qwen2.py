"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v, which edits of their rows carry along."""

from subnibble.model.arch import llama
from subnibble.model.site import Arch

QWEN2 = Arch(
    "qwen2",
    sites=(llama.ATTENTION_IN, llama.ATTENTION_OUT, llama.MLP_IN, llama.MLP_HIDDEN),
    residual=llama.RESIDUAL,
)
