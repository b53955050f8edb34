"""Every name of transformers that subnibble relies on, beside `from_pretrained` and what `import transformers` offers.

transformers renames arguments between minor releases: `past_key_values` became `cache` after 5.20. What differs is
asked of signatures here, once; a name that is not known is `UnsupportedTransformers`. No other file spells these names:
`tests/test_transformers_api.py` reads the sources for them.
"""
