"""A checkpoint folder appears complete or not at all, and never at the cost of what was there."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from writer_samples import CONFIG, SHARDS, Interrupted, bytes_by_name, content, everything, write

from subnibble.checkpoint import writer as writer_module
from subnibble.checkpoint.checksums import weight_checksums
from subnibble.checkpoint.writer import CheckpointWriter, check_output, is_packed
from subnibble.errors import OutputError


def fail_with(error: Exception, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `after` shards be written, then leave half a file and raise, as a full disk does."""
    save_file, calls = writer_module.save_file, []

    def failing(tensors, file, metadata) -> None:
        calls.append(file)
        if len(calls) <= after:
            return save_file(tensors, file, metadata=metadata)
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(writer_module, "save_file", failing)


def test_output_appears_only_on_commit(tmp_path) -> None:
    final = tmp_path / "out"
    with CheckpointWriter(final, 1, replace=False) as writer:
        writer.write_shard(SHARDS[0])
        writer.write_text("recipe.toml", "bits = 4\n")
        writer.write_json("config.json", CONFIG)
        writer.finish_weights()
        assert not final.exists()
        writer.commit()
        assert final.is_dir()
    assert everything(tmp_path) == {"out", "out/model.safetensors", "out/recipe.toml", "out/config.json"}
    assert (final / "recipe.toml").read_text() == "bits = 4\n"
    assert json.loads((final / "config.json").read_text()) == CONFIG


def test_leaving_without_commit_leaves_nothing(tmp_path) -> None:
    with CheckpointWriter(tmp_path / "out", 1, replace=False) as writer:
        writer.write_shard(SHARDS[0])
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("error", [Interrupted("stop"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_an_exception_leaves_nothing_and_passes_through(tmp_path, error) -> None:
    names = []

    def fail_between_shards() -> None:
        with CheckpointWriter(tmp_path / "out", 2, replace=False) as writer:
            writer.write_shard(SHARDS[0])
            names.extend(everything(tmp_path))
            raise error

    with pytest.raises(type(error)) as caught:
        fail_between_shards()
    assert caught.value is error
    assert names
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("parent_mode", [0o777, 0o755, 0o700])
def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path, parent_mode) -> None:
    # Below /tmp, which all may write, the checkpoint must not become writable for all.
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(parent_mode)
    (parent / "plain").mkdir()
    write(parent / "out", SHARDS[:1])
    assert (parent / "out").stat().st_mode == (parent / "plain").stat().st_mode


def test_missing_parents_are_made(tmp_path) -> None:
    write(tmp_path / "a" / "b" / "out", SHARDS[:1])
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").is_file()


def test_an_empty_folder_is_taken(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", SHARDS[:1])
    assert everything(tmp_path) == {"out", "out/model.safetensors", "out/config.json"}


@pytest.mark.parametrize("name", [".", "../here"])
def test_an_empty_current_folder_is_taken_under_any_name(tmp_path, monkeypatch, name) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path(name), SHARDS[:1])
    assert everything(tmp_path) == {"here", "here/model.safetensors", "here/config.json"}


def test_what_a_killed_run_left_behind_is_in_nobodys_way(tmp_path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model.safetensors.part").write_bytes(b"half")
    write(tmp_path / "out", SHARDS[:1])
    assert set(content(tmp_path / "out")) == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("files", [["notes.txt"], [".hidden"], ["config.json"], ["model.safetensors"]])
def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, files, replace) -> None:
    (tmp_path / "out").mkdir()
    for file in files:
        (tmp_path / "out" / file).write_text("{}")
    before = content(tmp_path)
    with pytest.raises(OutputError, match="not a subnibble checkpoint" if replace else "is not empty"):
        write(tmp_path / "out", SHARDS, replace)
    assert content(tmp_path) == before


def test_a_file_in_the_way_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "out").write_text("mine")
    for replace in (False, True):
        with pytest.raises(OutputError, match="is a file"):
            write(tmp_path / "out", SHARDS, replace)
    assert content(tmp_path) == {"out": b"mine"}


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be created"):
        write(tmp_path / "file" / "out", SHARDS[:1])


def test_a_checkpoint_is_replaced_whole_and_only_when_asked(tmp_path) -> None:
    write(tmp_path / "out", SHARDS)
    before = content(tmp_path)
    with pytest.raises(OutputError, match="is not empty"):
        write(tmp_path / "out", SHARDS[:1])
    assert content(tmp_path) == before
    write(tmp_path / "out", SHARDS[:1], replace=True)
    assert everything(tmp_path) == {"out", "out/model.safetensors", "out/config.json"}


def test_the_old_checkpoint_stays_in_place_until_the_commit(tmp_path) -> None:
    write(tmp_path / "out", SHARDS)
    before = bytes_by_name(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", 1, replace=True) as writer:
        writer.write_shard(SHARDS[0])
        writer.finish_weights()
        assert bytes_by_name(tmp_path / "out") == before
        writer.commit()
    assert content(tmp_path / "out") != before


ERRORS = {
    "full disk, told by safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
    "full disk, told by the system": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "no permission": PermissionError(errno.EACCES, "Permission denied"),
    "another failure of safetensors": SafetensorError("invalid header"),
}


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("name", ERRORS)
def test_a_shard_that_cannot_be_written_is_an_output_error_and_leaves_nothing(
    tmp_path, monkeypatch, name, after
) -> None:
    fail_with(ERRORS[name], after, monkeypatch)
    with pytest.raises(OutputError, match="out: "):
        write(tmp_path / "out", SHARDS)
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("error", [*ERRORS.values(), Interrupted("stop")])
def test_a_failed_replacement_leaves_the_old_checkpoint_intact(tmp_path, monkeypatch, error) -> None:
    write(tmp_path / "out", SHARDS[:2])
    before = content(tmp_path)
    fail_with(error, 1, monkeypatch)
    with pytest.raises((OutputError, Interrupted)):
        write(tmp_path / "out", SHARDS, replace=True)
    assert content(tmp_path) == before


def test_a_full_disk_says_so(tmp_path, monkeypatch) -> None:
    fail_with(ERRORS["full disk, told by safetensors"], 1, monkeypatch)
    with pytest.raises(OutputError, match="No space left on device; nothing was kept"):
        write(tmp_path / "out", SHARDS)


def test_one_shard_is_model_safetensors_without_an_index(tmp_path) -> None:
    write(tmp_path / "out", SHARDS[:1])
    assert set(content(tmp_path / "out")) == {"model.safetensors", "config.json"}
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert set(result) == set(SHARDS[0])
    for name, tensor in SHARDS[0].items():
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name], tensor)


def test_several_shards_have_an_index_that_covers_every_tensor(tmp_path) -> None:
    final = tmp_path / "out"
    write(final, SHARDS)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert set(content(final)) == {*names, "model.safetensors.index.json", "config.json"}
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1], "d": names[2]}
    # Six int64, two float16, none, twelve uint8.
    assert index["metadata"] == {"total_size": 48 + 4 + 12}
    for name, shard in zip(names, SHARDS, strict=True):
        result = load_file(final / name)
        assert set(result) == set(shard)
        assert all(torch.equal(result[key], tensor) for key, tensor in shard.items())


@pytest.mark.parametrize("written", [1, 3])
def test_another_number_of_shards_than_announced_is_an_error(tmp_path, written) -> None:
    with CheckpointWriter(tmp_path / "out", 2, replace=False) as writer:
        for shard in SHARDS[:written]:
            writer.write_shard(shard)
        with pytest.raises(ValueError, match=f"{written} of 2 shards"):
            writer.finish_weights()


@pytest.mark.parametrize(
    ("config", "packed"),
    [
        (json.dumps(CONFIG), True),
        (json.dumps({"quantization_config": {"quant_method": "gptq"}}), False),
        (json.dumps({"quantization_config": "subnibble"}), False),
        (json.dumps({"model_type": "llama"}), False),
        (json.dumps(["subnibble"]), False),
        ("{", False),
        ("\udcff", False),
        (None, False),
    ],
)
def test_a_subnibble_checkpoint_is_known_by_its_config(tmp_path, config, packed) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    assert is_packed(tmp_path) is packed


def test_a_folder_that_does_not_exist_may_be_written(tmp_path) -> None:
    check_output(tmp_path / "out", replace=False)
    check_output(tmp_path / "out", replace=True)
    assert everything(tmp_path) == set()


def test_numbers_that_were_written_can_be_replaced_before_the_commit(tmp_path) -> None:
    shards = [{"a": torch.zeros(2, dtype=torch.float16), "b": torch.ones(3)}, {"c": torch.ones(1)}]
    with CheckpointWriter(tmp_path / "out", 2, replace=False) as writer:
        for shard in shards:
            writer.write_shard(shard)
        checksums = {}
        writer.rewrite({"a": torch.tensor([1.0, 2.0]), "c": torch.tensor([5.0])}, checksums.__setitem__)
        assert checksums == writer.checksums == weight_checksums(writer.folder)
        with pytest.raises(ValueError, match="b was written as"):
            writer.rewrite({"b": torch.ones(4)}, checksums.__setitem__)
        writer.write_json("config.json", CONFIG)
        writer.finish_weights()
        writer.commit()

    result = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        result |= load_file(file)
    assert result["a"].dtype == torch.float16
    assert {name: part.tolist() for name, part in result.items()} == {"a": [1, 2], "b": [1, 1, 1], "c": [5]}
