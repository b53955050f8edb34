"""Entries and configs of the format, and their way through JSON."""

import json
from dataclasses import replace

from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import NormBiasSpec, PackedEmbeddingSpec, PackedLinearSpec, TiedHeadSpec
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedLayout
from subnibble.tensor.scheme import Scheme

W3, W8 = Scheme(3, 128), Scheme(8, -1, "none", "bfloat16")
TABLE, HEAD = "model.embed_tokens", "lm_head"
Q, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm"
DOWN = "model.layers.0.mlp.down_proj"
CONFIG = PackedConfig(
    {
        TABLE: PackedEmbeddingSpec(PackedLayout(100, ((64, W8),))),
        HEAD: TiedHeadSpec(TABLE),
        Q: PackedLinearSpec(PackedLayout(64, ((48, W3), (16, W8))), True),
        DOWN: PackedLinearSpec(PackedLayout(64, ((192, W3),)), False),
        NORM: NormBiasSpec(64),
    }
)
SCALED = PackedConfig(
    {**CONFIG.modules, DOWN: PackedLinearSpec(PackedLayout(64, ((192, W3),)), False, column_scale=True)}
)
MX = Scheme(4, 32, "none", "e8m0", "mxfp4")
A4, A8, AMX = ActivationScheme(4, 128, clip=0.9), ActivationScheme(8), ActivationScheme(4, 32, "none", "mxfp4")
# Every term there is.
WHOLE = PackedLinearSpec(
    PackedLayout(64, ((128, W3), (64, W8))),
    True,
    column_scale=True,
    gather=True,
    blocks=(128, 64),
    activation=A4,
    salient=PackedLayout(64, ((32, MX),)),
    requantized=32,
    low_rank=(PackedLayout(8, ((192, W8),)), PackedLayout(64, ((8, W8),))),
)
COMPOSED = PackedConfig({**CONFIG.modules, DOWN: WHOLE})
# Two readers of one tensor, of which the second stores nothing of what becomes of it.
K = "model.layers.0.self_attn.k_proj"
FIRST = PackedLinearSpec(PackedLayout(64, ((64, W3),)), False, True, True, (64,), A4)
SHARED = PackedConfig({Q: FIRST, K: replace(FIRST, layout=PackedLayout(32, ((64, W8),)), input=Q)})
# Each is the plain linear with one term.
ONE_TERM = {
    "column_scale": {"column_scale": True},
    "gather": {"gather": True},
    "hadamard": {"blocks": (128, 64)},
    "activation": {"activation": A8},
    "salient": {"salient": PackedLayout(64, ((16, W8),))},
    "low_rank": {"low_rank": (PackedLayout(4, ((192, W8),)), PackedLayout(64, ((4, W8),)))},
}


def through_json(config: PackedConfig) -> dict:
    return json.loads(json.dumps(config.to_dict()))
