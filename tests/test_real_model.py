"""The embedded real model: its GGUF file, its first blocks quantized and measured; the demo."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from subnibble import Generator, Recipe, quantize
from subnibble.calibrate.text import read_text
from subnibble.calibrate.windows import evaluation_windows
from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.checkpoint.size import measure
from subnibble.cli.demo import demo
from subnibble.evaluation.perplexity import score
from subnibble.generate.native_backend import NativeBackend
from subnibble.hf import load_model, memory_bytes, packed_modules
from subnibble.kernels.native import TORCH, chosen, why_missing
from subnibble.packaged.model import find_model

# Each is nearer to the original than the one before.
METHODS = ("rtn", "gptq", "d2quant-plus")
BLOCKS = 3


@pytest.fixture(scope="module", autouse=True)
def metadata_read_once() -> Iterator[None]:
    """To read the file's vocabulary takes seconds; transformers would make the map of names again for each module."""
    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(gguf.GGUFReader)
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="module")
def source() -> GgufSource:
    return GgufSource(find_model())


@pytest.fixture(scope="module")
def original(source: GgufSource) -> torch.nn.Module:
    return load_model(source)


@pytest.fixture(scope="module")
def shallow(source: GgufSource, original: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first blocks of the real model, as a folder."""
    folder = tmp_path_factory.mktemp("shallow")
    config = copy.deepcopy(original.config)
    config.num_hidden_layers = BLOCKS
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = original.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.save_pretrained(folder)
    source.load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed_folders(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Method -> its packed folder, worst first."""
    root = tmp_path_factory.mktemp("packed")
    # The beginning of the news: to tokenize all of them takes seconds.
    text = root / "news.txt"
    text.write_text(read_text("news", "calibration")[:100_000])
    for method in METHODS:
        settings = {} if method == "rtn" else {"calibration": str(text), "num_windows": 4, "window": 384}
        quantize(shallow, root / method, Recipe(method=method, bits=3, embedding_bits=8, **settings))
    return {method: root / method for method in METHODS}


@pytest.mark.skipif(why_missing() is not None, reason="there are no kernels")
def test_the_native_step_chooses_the_tokens_that_torch_would(packed_folders: dict[str, Path]) -> None:
    """Of 16-bit inputs. Sums in another order and 16-bit keys may move a logit by a little: fewer than 0.1."""
    folder = packed_folders["d2quant-plus"]
    model = load_model(folder, "float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = NativeBackend(model)
    lines = [line for line in read_text("news", "test").split("\n") if len(line) > 200][:6]
    texts = [tokenizer(line, add_special_tokens=False).input_ids[:24] for line in lines]
    slots = [backend.open() for _ in texts]
    chosen = backend.forward(slots, texts).argmax(-1).tolist()
    for _ in range(47):
        texts = [[*ids, token] for ids, token in zip(texts, chosen, strict=True)]
        chosen = backend.forward(slots, [[token] for token in chosen]).argmax(-1).tolist()
    others = 0
    for ids in texts:
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0, 23:]
        gap = logits.amax(-1) - logits.gather(1, torch.tensor(ids[24:]).unsqueeze(1))[:, 0]
        assert gap.max() < 0.1
        others += int((gap > 0).sum())
    assert others < 10


def test_gguf_gives_the_weights_that_transformers_gives(source: GgufSource, original: torch.nn.Module) -> None:
    file = find_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = dict(original.named_parameters())
    assert set(ours) == set(dict(theirs.named_parameters()))
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours[name], parameter), name
    size = measure(source)
    assert size.effective_bits == 5.0
    assert size.parameters == 134_515_008


def test_each_method_is_nearer_to_the_original_than_the_one_before(
    packed_folders: dict[str, Path], shallow: Path, source: GgufSource, tmp_path: Path
) -> None:
    text = tmp_path / "news.txt"
    text.write_text(read_text("news", "test")[:10_000])
    windows = evaluation_windows(str(text), source.load_tokenizer(), 256, 2)
    models = {name: load_model(folder) for name, folder in packed_folders.items()}
    scores = score(models, windows, None, load_model(shallow))
    for worse, better in itertools.pairwise(METHODS):
        assert scores[better].kl_divergence < 0.8 * scores[worse].kl_divergence
    reports = [json.loads((folder / "report.json").read_text()) for folder in packed_folders.values()]
    bits = [report["size"]["effective_bits"] for report in reports]
    assert bits[0] == bits[1]
    assert 3.0 < bits[0] < 3.2
    assert bits[2] - bits[1] <= 0.12


def test_packed_real_model_is_small_and_equal_to_its_dense_form(packed_folders: dict[str, Path], shallow: Path) -> None:
    packed, dense = load_model(packed_folders["gptq"]), load_model(shallow)
    assert memory_bytes(packed) < 0.22 * memory_bytes(dense)
    for path, module in packed_modules(packed).items():
        dense.get_submodule(path).weight.data = module.packed.dequantize()
    ids = torch.arange(100, 164).unsqueeze(0)
    with torch.no_grad():
        exact = dense(ids).logits
        with chosen(TORCH):
            assert torch.equal(packed(ids).logits, exact)
        assert float((packed(ids).logits - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.slow
def test_the_demo_speaks_and_its_best_model_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo(num_windows=2, window=256, max_windows=1, out=tmp_path)
    table, *said = capsys.readouterr().out.split("answers")
    assert len(said) == 2
    assert all(len(text.split()) > 8 for text in said)
    perplexity = {line.split()[0]: float(line.split()[1]) for line in table.splitlines() if "w3" in line}
    gptq, best = perplexity.values()
    assert best < 0.9 * gptq


def test_packed_real_model_continues_a_prompt(packed_folders: dict[str, Path], source: GgufSource) -> None:
    packed = load_model(packed_folders["gptq"])
    generator = Generator(packed, source.load_tokenizer())
    completion = generator.generate("The capital of France is", max_new_tokens=8)
    assert len(completion.text.split()) >= 3
    turns = [{"role": "user", "content": "Say hello."}]
    assert generator.generate(turns, max_new_tokens=4, temperature=0.7, seed=1).text
