"""Llama and models with the same block (SmolLM2, TinyLlama, ...): RMSNorm before each module, rotary GQA, gated MLP."""

from subnibble.arch.site import Arch, Residual, Role, Site, Tail

ATTENTION_IN = Site(
    name=Role.ATTENTION_IN,
    norm="input_layernorm",
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
ATTENTION_OUT = Site(
    name=Role.ATTENTION_OUT,
    writers=("self_attn.v_proj",),
    readers=("self_attn.o_proj",),
    edits=frozenset({"scale", "permute"}),
    per_head=True,
    queries=("self_attn.q_proj",),
    keys=("self_attn.k_proj",),
    tail=Tail("self_attn", extra_outputs=1),
)
MLP_IN = Site(
    name=Role.MLP_IN,
    norm="post_attention_layernorm",
    readers=("mlp.gate_proj", "mlp.up_proj"),
)
MLP_HIDDEN = Site(
    name=Role.MLP_HIDDEN,
    writers=("mlp.up_proj",),
    followers=("mlp.gate_proj",),
    readers=("mlp.down_proj",),
    edits=frozenset({"scale", "permute"}),
    tail=Tail("mlp"),
)
RESIDUAL = Residual(
    norms=("input_layernorm", "post_attention_layernorm"),
    readers=ATTENTION_IN.readers + MLP_IN.readers,
    writers=("self_attn.o_proj", "mlp.down_proj"),
)

LLAMA = Arch("llama", sites=(ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_HIDDEN), residual=RESIDUAL)
