"""The words that options of methods may have, for people to choose from; each is checked where it is used."""

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
# Of the KV cache, see `CacheScheme`.
KV_CHOICES = {
    "group_size": "channels, -1: the whole head; of keys by channel, tokens",
    "key_axis": ", ".join(cache_scheme.KEY_AXES),
    "rope": ", ".join(cache_scheme.ROPES),
    "key_rotation": ", ".join(cache_scheme.KEY_ROTATIONS),
    "window": "last tokens at 16 bits",
    "clip": "share of the range that is kept",
    "key_center": ", ".join(cache_scheme.KEY_CENTERS),
}
# Of the tuning of the packed model as a whole, see `Distillation`.
DISTILL_CHOICES = {
    "tokens": "calibration tokens of a step",
    "rate": "largest step, as a share of what is changed",
    "scales": "true, false: scales of weights are learned",
    "zero_points": "true, false: real zero-points are",
    "column_scales": "true, false: column scales that linears store are",
    "norms": "true, false: gains of norms are",
    "norm_biases": "true, false: biases that norms got against mean shift are",
    "clips": "true, false: clips of quantized inputs are",
}
