"""A rotated model is the same function in another basis, and Hadamard matrices are what they should be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import subnibble
from conftest import CONFIGS, random_model
from subnibble import Recipe
from subnibble.arch import ARCHITECTURES
from subnibble.arch.llama import LLAMA
from subnibble.arch.site import Arch, Heads
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe, UnsupportedModel
from subnibble.methods import METHODS
from subnibble.model.skeleton import Block, Skeleton
from subnibble.pipeline.check import _check_rotation
from subnibble.pipeline.estimate import estimate
from subnibble.pipeline.plan import plan_rotation
from subnibble.tensor.scheme import Scheme
from subnibble.transforms import rotate
from subnibble.transforms.rotate import (
    ROTATIONS,
    Rotation,
    can_rotate,
    check_rotation,
    make_rotation,
    offline_hadamard,
    rotate_block_,
)

CPU = torch.device("cpu")
ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 128, 576, 1536)
SAME = 1e-10
FAULT = 1e-4


def is_hadamard(matrix: Tensor, order: int) -> bool:
    target = order * torch.eye(order, dtype=torch.float64)
    return matrix.shape == (order, order) and bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, target)


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_has_entries_of_one_and_orthogonal_rows(order: int) -> None:
    matrix = offline_hadamard(order)
    assert matrix is not None
    assert matrix.dtype == torch.float64
    assert is_hadamard(matrix, order)


def test_the_hadamard_oracle_rejects_planted_faults() -> None:
    right = offline_hadamard(12)
    assert right is not None
    flipped, halved = right.clone(), right.clone()
    flipped[3, 7] *= -1
    halved[3, 7] = 0
    for wrong in (flipped, halved, right[:11], right[:, [0, *range(11)]], torch.ones(12, 12, dtype=torch.float64)):
        assert not is_hadamard(wrong, 12)


@pytest.mark.parametrize("order", [3, 5, 6, 7, 10, 14, 50, 99])
def test_an_order_out_of_reach_has_no_hadamard_matrix(order: int) -> None:
    assert offline_hadamard(order) is None


def whole(rotation: Rotation | None) -> Tensor:
    """Q as one matrix, float64."""
    assert rotation is not None
    return torch.block_diag(*rotation.blocks)


def departure(q: Tensor) -> float:
    """The largest element of Qᵀ Q - 1."""
    return float((q.T @ q - torch.eye(q.shape[0], dtype=q.dtype)).abs().max())


@pytest.mark.parametrize(
    ("name", "width", "group", "sizes"),
    [
        ("full", 48, 32, [48]),
        ("full", 576, 128, [576]),
        ("groups", 576, 128, [128, 128, 128, 128, 64]),
        ("groups", 48, 32, [32, 16]),
        ("groups", 48, 16, [16, 16, 16]),
        ("groups", 64, -1, [64]),
        ("groups", 24, 128, [24]),
    ],
)
def test_a_rotation_is_orthogonal_with_a_block_for_each_group(
    name: str, width: int, group: int, sizes: list[int]
) -> None:
    rotation = make_rotation(name, width, Scheme(4, group), 0, CPU)
    assert rotation is not None
    assert [tuple(block.shape) for block in rotation.blocks] == [(size, size) for size in sizes]
    q = whole(rotation)
    assert departure(q) < 1e-13
    # Every channel is spread evenly over its block.
    for block in rotation.blocks:
        assert float((block.abs() - block.shape[0] ** -0.5).abs().max()) < 1e-15


def test_rows_and_columns_are_products_with_the_matrix_in_float64() -> None:
    rotation = make_rotation("groups", 48, Scheme(4, 32), 3, CPU)
    assert rotation is not None
    q, generator = whole(rotation), torch.Generator().manual_seed(1)
    wide, tall, vector = (torch.randn(size, generator=generator) for size in ((7, 48), (48, 5), (48,)))
    assert torch.equal(rotation.rotate_columns(wide), (wide.double() @ q).float())
    assert torch.equal(rotation.rotate_rows(tall), (q.T @ tall.double()).float())
    assert torch.equal(rotation.rotate_rows(vector), (q.T @ vector.double()).float())
    assert rotation.rotate_columns(wide.bfloat16()).dtype == torch.bfloat16
    # Q is not its own inverse, so that a transpose too many shows.
    assert float((q - q.T).abs().max()) > 0.1


def test_a_table_is_turned_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation = make_rotation("groups", 48, Scheme(4, 32), 3, CPU)
    assert rotation is not None
    table = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    at_once = rotation.rotate_columns(table)
    monkeypatch.setattr(rotate, "_ROWS", 3)
    heights: list[int] = []
    double = Tensor.double
    monkeypatch.setattr(Tensor, "double", lambda part: heights.append(part.shape[0]) or double(part))
    assert torch.equal(rotation.rotate_columns(table), at_once)
    assert sorted(set(heights)) == [1, 3]


@pytest.mark.parametrize("name", ["full", "groups"])
def test_the_seed_alone_draws_the_rotation(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (whole(make_rotation(name, 48, Scheme(4, 16), seed, CPU)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_none_is_no_rotation_of_any_width() -> None:
    assert make_rotation("none", 50, Scheme(4, 7), 0, CPU) is None


@pytest.mark.parametrize(
    ("name", "width", "group", "choice"),
    [
        ("full", 50, 16, 'order 50 .* 50 channels; use rotation = "none", or "groups" with a group size of 16'),
        (
            "groups",
            48,
            10,
            'order 10 .* 48 channels; use rotation = "none", or "full", or "groups" with a group size of 16, 32',
        ),
        ("groups", 70, 64, 'order 6 .* 70 channels; use rotation = "none"$'),
    ],
)
def test_a_width_without_a_hadamard_matrix_is_refused_with_the_choices(
    name: str, width: int, group: int, choice: str
) -> None:
    with pytest.raises(BadRecipe, match=choice):
        make_rotation(name, width, Scheme(4, group), 0, CPU)


def test_an_unknown_rotation_is_refused_with_the_choices() -> None:
    for name in ROTATIONS:
        check_rotation(name)
    with pytest.raises(BadRecipe, match="rotation is 'quick'; choose one of none, full, groups"):
        check_rotation("quick")
    for method in METHODS.values():
        if not hasattr(method.options(), "rotation"):
            continue
        with pytest.raises(BadRecipe, match="rotation is 'quick'"):
            method.build(method.configure({"rotation": "quick"}))


def without_reader(arch: Arch) -> Arch:
    sites = tuple(
        replace(site, readers=tuple(reader for reader in site.readers if reader != "mlp.gate_proj"))
        for site in arch.sites
    )
    return replace(arch, sites=sites)


def without_norms(arch: Arch) -> Arch:
    return replace(arch, sites=tuple(replace(site, norm=None) for site in arch.sites))


def test_a_reader_without_a_norm_of_its_own_forbids_rotation(folders: dict[str, Path]) -> None:
    assert all(can_rotate(arch) for arch in ARCHITECTURES.values())
    assert not can_rotate(without_reader(LLAMA))
    skeleton = Skeleton(SafetensorsSource(folders["llama"]), torch.float32, CPU)
    rotated, plain = (METHODS["rtn"].build(METHODS["rtn"].configure({"rotation": name})) for name in ("full", "none"))
    assert plan_rotation(Recipe(), rotated, skeleton) is not None
    skeleton.arch = without_norms(LLAMA)
    assert plan_rotation(Recipe(), plain, skeleton) is None
    with pytest.raises(UnsupportedModel, match='without a norm; use rotation = "none"'):
        _check_rotation(rotated, skeleton.arch)


# The model: in float64, with norms that do not go through float32 as transformers' do.


def exact_model(name: str) -> Any:
    model: Any = random_model(name).double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    head = model.lm_head.weight.detach().clone()
    # Untied: the head is rotated by itself.
    model.lm_head.weight = nn.Parameter(head)
    return model.requires_grad_(False)


def blocks(model: Any, arch: Arch | None = None) -> list[Block]:
    result = arch or ARCHITECTURES[model.config.model_type]
    return [
        Block(i, result.block_path(i), layer, result, Heads.of(model.config))
        for i, layer in enumerate(model.model.layers)
    ]


def rotate_outside_(model: Any, rotation: Rotation) -> None:
    """Embedding, final norm and head, by hand."""
    q = whole(rotation)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ q)
    model.lm_head.weight.copy_((model.lm_head.weight * model.model.norm.weight) @ q)
    model.model.norm.weight.fill_(1)


def rotated_model(model: Any, rotation: Rotation) -> Any:
    rotated = copy.deepcopy(model)
    for block in blocks(rotated):
        rotate_block_(block, rotation)
    rotate_outside_(rotated, rotation)
    return rotated


def departures(actual: Any, target: Any, q: Tensor) -> tuple[float, float]:
    """Largest relative distance of the residual stream's states, and of the logits, over every token."""
    ids = torch.arange(44).view(2, 22) * 7 % 96
    with torch.no_grad():
        a, b = (model(ids, output_hidden_states=True) for model in (actual, target))
    # The last of transformers' hidden states lies behind the final norm, whose gain the head has.
    states = [
        float(((x - y @ q).norm(dim=-1) / y.norm(dim=-1)).max())
        for x, y in zip(a.hidden_states[:-1], b.hidden_states[:-1], strict=True)
    ]
    return max(states), float(((a.logits - b.logits).norm(dim=-1) / b.logits.norm(dim=-1)).max())


@pytest.mark.parametrize("rotation", ["full", "groups"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rotated_model_is_the_same_function(name: str, rotation: str) -> None:
    model = exact_model(name)
    residual_rotation = make_rotation(rotation, model.config.hidden_size, Scheme(4, 32), 2, CPU)
    assert residual_rotation is not None
    states, logits = departures(rotated_model(model, residual_rotation), model, whole(residual_rotation))
    assert states < SAME
    assert logits < SAME


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rotated_block_has_gains_of_one_and_untouched_heads(name: str) -> None:
    model = exact_model(name)
    residual_rotation = make_rotation("full", model.config.hidden_size, Scheme(4, 32), 2, CPU)
    assert residual_rotation is not None
    rotated = rotated_model(model, residual_rotation)
    for old, new in zip(blocks(model), blocks(rotated), strict=True):
        for norm in new.arch.residual.norms:
            assert torch.equal(new.gain(norm), torch.ones_like(new.gain(norm)))
        for linear in new.arch.residual.readers:
            if old.linear(linear).bias is not None:
                assert torch.equal(new.linear(linear).bias, old.linear(linear).bias)
        changed = {n for n, p in new.module.named_parameters() if not torch.equal(p, old.module.get_parameter(n))}
        assert changed == {
            *(f"{norm}.weight" for norm in new.arch.residual.norms),
            *(f"{linear}.weight" for linear in (*new.arch.residual.readers, *new.arch.residual.writers)),
            *(f"{n}.bias" for n in new.arch.residual.writers if new.linear(n).bias is not None),
        }


def gain_not_fused(model: Any, rotation: Rotation) -> Any:
    rotated = copy.deepcopy(model)
    for block in blocks(rotated, without_norms(ARCHITECTURES[model.config.model_type])):
        rotate_block_(block, rotation)
    rotate_outside_(rotated, rotation)
    return rotated


def gain_fused_but_not_reset(model: Any, rotation: Rotation) -> Any:
    rotated = rotated_model(model, rotation)
    rotated.model.layers[1].post_attention_layernorm.weight.copy_(model.model.layers[1].post_attention_layernorm.weight)
    return rotated


def attention_bias_not_rotated(model: Any, rotation: Rotation) -> Any:
    rotated = rotated_model(model, rotation)
    rotated.model.layers[1].self_attn.o_proj.bias.copy_(model.model.layers[1].self_attn.o_proj.bias)
    return rotated


def mlp_bias_not_rotated(model: Any, rotation: Rotation) -> Any:
    rotated = rotated_model(model, rotation)
    rotated.model.layers[2].mlp.down_proj.bias.copy_(model.model.layers[2].mlp.down_proj.bias)
    return rotated


def head_without_the_final_gain(model: Any, rotation: Rotation) -> Any:
    rotated = rotated_model(model, rotation)
    rotated.lm_head.weight.copy_(model.lm_head.weight @ whole(rotation))
    return rotated


def final_gain_kept(model: Any, rotation: Rotation) -> Any:
    rotated = rotated_model(model, rotation)
    rotated.model.norm.weight.copy_(model.model.norm.weight)
    return rotated


def writer_rotated_the_other_way(model: Any, rotation: Rotation) -> Any:
    rotated = rotated_model(model, rotation)
    rotated.model.layers[0].mlp.down_proj.weight.copy_(whole(rotation) @ model.model.layers[0].mlp.down_proj.weight)
    return rotated


def reader_not_rotated(model: Any, rotation: Rotation) -> Any:
    rotated = rotated_model(model, rotation)
    layer = model.model.layers[1]
    rotated.model.layers[1].self_attn.k_proj.weight.copy_(layer.self_attn.k_proj.weight * layer.input_layernorm.weight)
    return rotated


def embedding_without_its_mean(model: Any, rotation: Rotation) -> Any:
    """What QuaRot's program does: exact for LayerNorm alone."""
    rotated = copy.deepcopy(model)
    rotated.model.embed_tokens.weight.sub_(rotated.model.embed_tokens.weight.mean(-1, keepdim=True))
    return rotated_model(rotated, rotation)


def one_sign_of_the_last_block_wrong(model: Any, rotation: Rotation) -> Any:
    last = rotation.blocks[-1].clone()
    last[:, 3] *= -1
    rotated = rotated_model(model, rotation)
    rows = Rotation((*rotation.blocks[:-1], last)).rotate_rows(model.model.layers[1].self_attn.o_proj.weight)
    rotated.model.layers[1].self_attn.o_proj.weight.copy_(rows)
    return rotated


FAULTS: list[Callable[[Any, Rotation], Any]] = [
    gain_not_fused,
    gain_fused_but_not_reset,
    attention_bias_not_rotated,
    mlp_bias_not_rotated,
    head_without_the_final_gain,
    final_gain_kept,
    writer_rotated_the_other_way,
    reader_not_rotated,
    embedding_without_its_mean,
    one_sign_of_the_last_block_wrong,
]


@pytest.mark.parametrize("rotation", ["full", "groups"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_of_a_rotation_move_the_logits(fault: Callable[[Any, Rotation], Any], rotation: str) -> None:
    model = exact_model("llama")
    residual_rotation = make_rotation(rotation, 48, Scheme(4, 32), 2, CPU)
    assert residual_rotation is not None
    _, logits = departures(fault(model, residual_rotation), model, whole(residual_rotation))
    assert logits > FAULT


# The pipeline: with one linear at 8 bits, all that is left of the difference is its rounding and storage at 16 bits.
STORED = 0.01


def stored_departures(name: str, rotation: str, folders: dict[str, Path], out: Path) -> tuple[float, float]:
    """Of a checkpoint made with a rotation; also checks what only the files can tell."""
    only = {r"re:(?!model\.layers\.2\.self_attn\.q_proj)": {"skip": True}}
    options = {"rotation": rotation}
    recipe = Recipe(method="rtn", bits=8, group_size=16, overrides=only, options=options, device="cpu", seed=4)
    report = subnibble.quantize(folders[name], out, recipe)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in out.glob("*.safetensors"))
    assert estimate(folders[name], recipe).file_bytes + headers == report.size["file_bytes"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    tied = original.config.tie_word_embeddings
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert hasattr(model.lm_head, "mix") is tied
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))
    residual_rotation = make_rotation(rotation, model.config.hidden_size, Scheme(8, 16), 4, CPU)
    return departures(model.double(), original.double(), whole(residual_rotation))


@pytest.mark.parametrize("rotation", ["full", "groups"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_a_rotated_checkpoint_is_the_same_function(
    name: str, rotation: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    states, logits = stored_departures(name, rotation, folders, tmp_path / "out")
    assert states < STORED
    assert logits < STORED


@pytest.mark.parametrize("rotation", ["full", "groups"])
@pytest.mark.parametrize("fault", ["left out", "gain left out", "another block"])
def test_planted_faults_of_a_tied_heads_matrix_move_the_logits(
    fault: str, rotation: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Rotation.head_input

    def wrong(self: Rotation, gain: Tensor) -> tuple[Tensor, ...]:
        result = right(self, torch.ones_like(gain) if fault == "gain left out" else gain)
        if fault == "left out":
            return tuple(torch.eye(block.shape[0]) for block in result)
        return result if fault == "gain left out" else (result[0].roll(1, 0), *result[1:])

    monkeypatch.setattr(Rotation, "head_input", wrong)
    states, logits = stored_departures("llama-tied", rotation, folders, tmp_path / "out")
    assert states < STORED
    assert logits > 3 * STORED


@pytest.mark.parametrize("forgotten", ["bias of a writer", "all of a block"])
def test_planted_faults_of_the_pipeline_move_the_stored_model(
    forgotten: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(block: Block, rotation: Rotation) -> None:
        bias = block.linear("mlp.down_proj").bias.clone()
        if block.index != 1 or forgotten != "all of a block":
            rotate_block_(block, rotation)
        with torch.no_grad():
            block.linear("mlp.down_proj").bias.copy_(bias)

    monkeypatch.setattr(rotate, "rotate_block_", forgetful)
    assert max(stored_departures("llama", "full", folders, tmp_path / "out")) > 3 * STORED


@pytest.mark.parametrize("name", ["full", "groups"])
def test_signs_come_before_mixing(name: str) -> None:
    """A common mean is spread over the channels, and another seed mixes other channels, not just other signs."""
    rotations = [make_rotation(name, 128, Scheme(2, 32), seed, torch.device("cpu")) for seed in (0, 1)]
    constant = torch.ones(1, 128, dtype=torch.float64)
    w = torch.randn(8, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for rotation in rotations:
        assert rotation is not None
        assert float(rotation.rotate_columns(constant).abs().max()) < 4
    one, other = (rotation.rotate_columns(w).abs() for rotation in rotations if rotation is not None)
    assert float((one - other).abs().max()) > 0.5
