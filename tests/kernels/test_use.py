"""Where packed modules use the kernels, where they do not, and that the rest of torch goes on working."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_samples import sample, tokens
from torch.autograd import forward_ad
from transformers import AutoModelForCausalLM

from linears import built
from subnibble.errors import BadArgument, BadRecipe
from subnibble.hf import packed_modules
from subnibble.hf.inputs import round_inputs_
from subnibble.kernels import native as kernels
from subnibble.kernels import verified
from subnibble.runtime import native, ops
from subnibble.runtime.modules import PackedEmbedding, PackedLinear, TiedHead
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme

needs_kernels = pytest.mark.skipif(not kernels.instruction_sets(), reason="the kernels were not built")


def linear(bias: bool = True) -> PackedLinear:
    weight = PackedTensor((sample(Scheme(3, 32), 300), sample(Scheme(8, -1, "none"), 19, seed=1)))
    low_rank = PackedTensor((sample(Scheme(4, 64), 319, rows=5),)), PackedTensor((sample(Scheme(4, -1), 5),))
    salient = PackedTensor((sample(Scheme(4, 16), 37),))
    return PackedLinear(built(weight, torch.randn(7) if bias else None, salient=salient, low_rank=low_rank))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of the products that kernels computed."""
    counts: list[int] = []
    product = native.product

    def counted(x, weight):
        counts.append(x.tokens.shape[0])
        return product(x, weight)

    monkeypatch.setattr(native, "product", counted)
    return counts


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 7, 60])
def test_few_and_many_tokens_are_those_of_the_reference_within_rounding(calls, count, dtype) -> None:
    module, x = linear().to(dtype), tokens(count, 319, dtype)
    y = module(x)
    assert calls == [count]
    with kernels.chosen(kernels.TORCH):
        exact = linear_in_float64(module, x)
        assert len(calls) == 1
    size = x.double().abs() @ module.dequantize().double().abs().T + 1
    assert y.dtype == dtype
    # The branch's inner tensor is rounded once more.
    assert bool(((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * 319**0.5 * size).all())


def linear_in_float64(module: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return x.double() @ module.dequantize().double().T + module.bias.double()


# torch's own forward-mode rules are compiled with what it calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@needs_kernels
def test_products_that_learn_and_other_dtypes_run_on_torch(calls) -> None:
    module, x = linear(), tokens(3, 319)
    expected = module(x).detach()
    learning = x.clone().requires_grad_()
    y = module(learning)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-3)
    y.sum().backward()
    torch.testing.assert_close(learning.grad[0], module.dequantize().sum(0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        module(learning)
    assert calls == [3, 3]
    module.bias.requires_grad_()
    # The bias is added by torch, so that it learns.
    module(x).sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full_like(module.bias, 3))
    assert calls == [3, 3, 3]
    module.bias.requires_grad_(False)
    copy.deepcopy(module).double()(x.double())
    with forward_ad.dual_level():
        dual = module(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(dual).tangent is not None
    assert calls == [3, 3, 3]


@needs_kernels
def test_autocast_gives_the_dtype_that_it_gave_on_torch() -> None:
    module, x = linear(), tokens(3, 319)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        with kernels.chosen(kernels.TORCH):
            expected = module(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=5.0)


@needs_kernels
def test_a_compiled_linear_calls_the_kernels_as_one_operation() -> None:
    module, x = linear(), tokens(3, 319)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-3)
        module.activation = ActivationScheme(8, 64)
        torch._dynamo.reset()
        assert torch.equal(compiled(x), module(x))


@needs_kernels
def test_the_compiled_operation_has_the_schema_that_it_claims() -> None:
    weight = PackedTensor((sample(Scheme(3, 32), 300),))
    state = weight.state()
    layouts = f"main 7 codes,scales,zeros 300,{native._text(Scheme(3, 32))}"
    assert native._layout(layouts) == weight.layout
    arguments = (tokens(3, 300), list(state.values()), layouts, "", 0, 7)
    torch.library.opcheck(native._compiled_product, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_kernels
def test_copies_and_moved_buffers_are_read_where_they_are() -> None:
    module, x = linear(), tokens(3, 319)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)
    # Shared memory is another address of the same tensors.
    module.share_memory()
    assert torch.equal(module(x), y)
    module.scales.data = module.scales.data * 2
    assert not torch.equal(module(x), y)


@needs_kernels
def test_an_embedding_is_dequantized_bit_for_bit() -> None:
    table = PackedTensor((sample(Scheme(4, 64), 139, rows=40),))
    ids = torch.tensor([[3, 39, 0], [7, 7, 21]])
    rows = PackedEmbedding(table, torch.bfloat16)(ids)
    with kernels.chosen(kernels.TORCH):
        assert torch.equal(rows, PackedEmbedding(table, torch.bfloat16)(ids))
        assert torch.equal(ops.dequantize(table), table.dequantize())
    assert torch.equal(ops.dequantize(table), table.dequantize())


@needs_kernels
def test_a_linear_says_what_runs_it_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "names", lambda: frozenset(kernels.instruction_sets()))
    monkeypatch.setattr(kernels, "_chosen", kernels._Chosen())
    module = linear()
    assert module.kernel == native.Choice(kernels.isa(), "fastest of this processor")
    with kernels.chosen("portable"):
        assert module.kernel == native.Choice("portable", "chosen")
    with kernels.chosen(kernels.TORCH):
        assert module.kernel == native.Choice("torch", "chosen")
    wide = "sums over more than 33025 columns may not fit 32 bits"
    assert native.choice("cpu", 33026) == native.Choice("torch", wide)
    assert linear().to("meta").kernel == native.Choice("torch", "kernels run on the CPU, not on meta")


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(BadRecipe, match=r"'sse9'.*choose one of .*torch"), kernels.chosen("sse9"):
        pass


def test_missing_kernels_are_reported_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(kernels, "module", None)
    monkeypatch.setattr(kernels, "_missing", "the kernels were not built")
    monkeypatch.setattr(kernels, "_chosen", kernels._Chosen())
    module, x = linear(), tokens(2, 319)
    with caplog.at_level(logging.WARNING):
        first, second = module(x), module(x)
    assert torch.equal(first, second)
    assert len(caplog.records) == 1
    assert "torch operations" in caplog.text
    assert module.kernel == native.Choice("torch", "the kernels were not built")


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_has_one_openmp_runtime() -> None:
    code = (
        "from subnibble.kernels import native; assert native.module is not None\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({path for path in maps if 'gomp' in path or 'iomp' in path or 'libomp' in path}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_inspect_shows_what_runs_each_module(run, packed: dict[str, Path], monkeypatch) -> None:
    code, out, _ = run("inspect", packed["qwen2"], "--json")
    assert code == 0
    content = json.loads(out)
    assert content["instruction_sets"] == list(kernels.instruction_sets())
    assert {entry["kernel"] for entry in content["kernels"].values()} == {kernels.isa()}
    assert "lm_head" in content["kernels"]
    monkeypatch.setenv("SUBNIBBLE_ISA", "torch")
    code, out, _ = run("inspect", packed["qwen2"])
    assert code == 0
    assert "torch: " in out
    monkeypatch.setenv("SUBNIBBLE_ISA", "nothing")
    assert run("inspect", packed["qwen2"])[0] == 2


@needs_kernels
def test_a_loaded_model_runs_on_the_kernels(packed: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    linears = [module for module in packed_modules(model).values() if isinstance(module, PackedLinear)]
    assert linears
    assert {module.kernel.kernel for module in linears} == {kernels.isa()}
    ids = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        logits = model(ids).logits
        with kernels.chosen(kernels.TORCH):
            torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_threads_that_share_a_module_get_what_each_gets_alone() -> None:
    module = linear()
    batches = [tokens(3, 319) * (i + 1) for i in range(16)]
    with torch.no_grad():
        alone = [module(x) for x in batches]
        fresh = copy.deepcopy(module)
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda x: fresh(x), batches))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@needs_kernels
def test_one_tensor_is_prepared_anew_for_other_settings() -> None:
    module, x = linear(), tokens(3, 319)
    first = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with kernels.chosen("portable"):
        assert torch.equal(module(x), first)
    with kernels.chosen(kernels.TORCH):
        assert not torch.equal(module(x), first)
    assert torch.equal(module(x), first)


@needs_kernels
def test_inputs_of_a_loaded_model_are_rounded_to_8_bits_if_asked(packed: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    ids = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        changed = round_inputs_(model, "int8")
        after = model(ids).logits
        with kernels.chosen(kernels.TORCH):
            torch.testing.assert_close(after, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert changed == sum(isinstance(module, PackedLinear | TiedHead) for module in model.modules())
    assert 1e-4 < float((after - before).norm() / before.norm()) < 0.05
    with pytest.raises(BadRecipe, match="no packed linear"):
        round_inputs_(model, "int8")
    with pytest.raises(BadRecipe, match=r"'int5'.*choose one of int8"):
        round_inputs_(model, "int5")


@needs_kernels
def test_a_model_whose_inputs_are_rounded_is_not_saved(packed: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    model.save_pretrained(tmp_path / "before")
    round_inputs_(model, "int8")
    for changed in (model, copy.deepcopy(model)):
        with pytest.raises(BadArgument, match=r"rounds its inputs to int8.*load it again"):
            changed.save_pretrained(tmp_path / "after")
    assert not list(tmp_path.glob("after/*.safetensors"))


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_the_option_is_named_in_the_output(command: str, run, packed: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w5 w9 w2 w7 " * 60)
    options = ["--text", text, "--window", "16"] if command == "evaluate" else ["--prompt", "w5 w9"]
    plain = run(command, packed["llama"], *options)
    rounded = run(command, packed["llama"], *options, "--activations", "int8")
    assert (plain[0], rounded[0]) == (0, 0)
    assert "int8" not in plain[1] + plain[2]
    assert "int8" in rounded[1] + rounded[2]
    assert run(command, packed["llama"], *options, "--activations", "int5")[0] == 2
