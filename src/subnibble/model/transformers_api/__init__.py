"""Every name of transformers that subnibble relies on, except `from_pretrained` and what `import transformers` offers.

transformers renames arguments between minor releases: `past_key_values` became `cache` after 5.20. This folder alone
reads signatures to find the names of the installed release, and raises `UnsupportedTransformers` if it knows none of
them. No other file contains these names: `tests/test_transformers_api.py` searches the sources for them.
"""
