"""The words that options of methods may have, for people to choose from; each is checked where it is used."""

from subnibble.corrections import mean_shift
from subnibble.methods import d2quant
from subnibble.rounding import gptaq, gptq, grid, order
from subnibble.transforms import rotate

OPTION_CHOICES = {
    key: ", ".join(choices)
    for key, choices in {
        "clip": grid.CLIPS,
        "order": order.ORDERS,
        "weighting": gptq.WEIGHTINGS,
        "asymmetry": gptaq.FORMS,
        "rotation": rotate.ROTATIONS,
        "mean_shift": mean_shift.FORMS,
        "columns": d2quant.COLUMNS,
        "rows": d2quant.ROWS,
    }.items()
}
