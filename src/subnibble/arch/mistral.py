"""Mistral: Llama's block without biases; sliding-window attention changes masks, not sites."""

from subnibble.arch.llama import LLAMA
from subnibble.arch.site import Arch

MISTRAL = Arch("mistral", sites=LLAMA.sites, residual=LLAMA.residual)
