"""Values of all options that are KEY=VALUE, as `subnibble list` shows them; checks are elsewhere."""

from subnibble.calibrate import sampling
from subnibble.corrections import mean_shift, salient
from subnibble.methods import bisup, d2quant, method, serq, weights
from subnibble.rounding import gptaq, grid, levels, order
from subnibble.tensor import cache_scheme
from subnibble.transforms import rotate, rotate_values, saliency
from subnibble.tuning import tuning

OPTION_CHOICES = {
    key: ", ".join(choices)
    for key, choices in {
        "clip": grid.CLIPS,
        "order": order.ORDERS,
        "weighting": levels.WEIGHTINGS,
        "asymmetry": gptaq.FORMS,
        "rotation": rotate.ROTATIONS,
        "value_rotation": rotate_values.VALUE_ROTATIONS,
        "mean_shift": mean_shift.FORMS,
        "columns": d2quant.COLUMNS,
        "rows": d2quant.ROWS,
        "rounding": weights.ROUNDINGS,
        "inputs": method.INPUTS,
        "flattening": serq.FLATTENINGS,
        "over": tuple(bisup.BASES),
        "clipping": tuning.CLIPPINGS,
        "input_clipping": tuning.INPUT_CLIPPINGS,
        "smoothing": tuning.SMOOTHINGS,
        "low_rank": tuning.LOW_RANKS,
        "effort": tuple(tuning.EFFORTS),
        "saliency": serq.SALIENCIES,
        "permutation": saliency.PERMUTATIONS,
        "residual": salient.RESIDUALS,
    }.items()
}
# Options of the KV cache, see `CacheScheme`.
KV_CHOICES = {
    "group_size": "channels per scale, -1: the whole head; with key_axis = channel: tokens",
    "key_axis": ", ".join(cache_scheme.KEY_AXES),
    "rope": ", ".join(cache_scheme.ROPES),
    "key_rotation": ", ".join(cache_scheme.KEY_ROTATIONS),
    "window": "number of last tokens that stay at 16 bits",
    "clip": "share of the value range that is kept",
    "key_center": ", ".join(cache_scheme.KEY_CENTERS),
}
# Options of distillation, see `Distillation`.
DISTILL_CHOICES = {
    "tokens": "calibration tokens per step",
    "rate": "largest relative change of a parameter per step, between 0 and 1",
    "scales": "true, false: learn weight scales",
    "zero_points": "true, false: learn real weight zero-points",
    "column_scales": "true, false: learn stored column scales",
    "norms": "true, false: learn norm gains",
    "norm_biases": "true, false: learn norm biases that correct mean shift",
    "clips": "true, false: learn clips of quantized inputs",
}
# Options of windows that the model writes, see `WindowSampling`.
SAMPLING_CHOICES = {
    "start": f"{sampling.AUTO}, {', '.join(sampling.STARTS)}; several joined by +",
    "prompts": "a text, or a list of texts, that documents begin with",
    "temperature": "a number above 0",
    "top_k": "number of most likely tokens that may be drawn, 0: all",
    "top_p": "total probability of the tokens that may be drawn",
    "min_p": "smallest probability that may be drawn, as a share of the largest",
}
