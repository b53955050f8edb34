"""Golden codes: whether two commits quantize to the same content. See README.md."""
