"""The words that options of methods may have, for people to choose from; each is checked where it is used."""

from subnibble.corrections import mean_shift, salient
from subnibble.methods import d2quant, method, serq, weights
from subnibble.rounding import gptaq, grid, levels, order
from subnibble.transforms import rotate, saliency

OPTION_CHOICES = {
    key: ", ".join(choices)
    for key, choices in {
        "clip": grid.CLIPS,
        "order": order.ORDERS,
        "weighting": levels.WEIGHTINGS,
        "asymmetry": gptaq.FORMS,
        "rotation": rotate.ROTATIONS,
        "mean_shift": mean_shift.FORMS,
        "columns": d2quant.COLUMNS,
        "rows": d2quant.ROWS,
        "rounding": weights.ROUNDINGS,
        "inputs": method.INPUTS,
        "flattening": serq.FLATTENINGS,
        "saliency": saliency.SCORES,
        "heads": saliency.HEAD_ORDERS,
        "residual_order": saliency.RESIDUAL_ORDERS,
        "ranks": method.RANKS,
        "form": salient.FORMS,
        "residual": salient.RESIDUALS,
    }.items()
}
