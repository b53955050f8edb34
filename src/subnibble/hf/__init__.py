"""Packed checkpoints in transformers. Importing this package registers the format there."""

from subnibble.hf.loading import load_model, memory_bytes
from subnibble.hf.plugin import SubnibbleConfig, SubnibbleQuantizer
from subnibble.runtime.modules import packed_modules

__all__ = ["SubnibbleConfig", "SubnibbleQuantizer", "load_model", "memory_bytes", "packed_modules"]
