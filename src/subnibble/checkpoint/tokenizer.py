"""Load a model's tokenizer, or raise an error that says what is wrong with it.

Code that comes with a tokenizer is never run. The tokenizer's files are read here first, so that an error can name a
damaged file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from subnibble.checkpoint.side_files import TEMPLATE_FOLDER
from subnibble.errors import CheckpointError, MissingExtra
from subnibble.text_file import check_plain_utf8, read_plain_json_file

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_TEXT_FILES = ("merges.txt", "vocab.txt", "chat_template.jinja", f"{TEMPLATE_FOLDER}/*.jinja")
# Vocabulary files that are not JSON, and the packages that read them.
_VOCABULARIES = ("*.model", "*.spm", "*.tiktoken", "tekken.json")
_SENTENCEPIECE, _TIKTOKEN, _MISTRAL = ("sentencepiece", "protobuf"), ("tiktoken",), ("mistral-common",)
_MODULES = {"protobuf": "google.protobuf", "mistral-common": "mistral_common"}
_OR_IDS = "or pass token ids (.npy or .safetensors) instead of text"
# Plain text, for which every correct reader of one tokenizer.json gives the same tokens.
_PROBE = "The quick brown fox\nsays 42 times: over here, and there."


def load_tokenizer(folder: Path, config: Any) -> Any:
    """Load the transformers tokenizer of a model folder.

    config: the transformers config of the same folder.
    Raises `CheckpointError` if files are missing, damaged or contradictory, `MissingExtra` if a package is missing.
    """
    from transformers import AutoTokenizer

    _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    # transformers, tokenizers and the packages they call raise many types, even plain Exception.
    except Exception as error:
        _refuse(folder, error)
    _check_tokens(tokenizer, folder)
    _trim_heap()
    return tokenizer


def _trim_heap() -> None:
    """Give what parsing left behind back to the system: 125 MB of a vocabulary of 150,000. Only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def load_gguf_tokenizer(file: Path) -> Any:
    """Load the tokenizer from a GGUF file's metadata.

    Raises `CheckpointError` if transformers cannot read it, `MissingExtra` if a package is missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise MissingExtra(f"{file}: its tokenizer needs another package ({_one_line(error)}); install it") from error
    except Exception as error:
        raise CheckpointError(
            f"{file}: transformers cannot read its tokenizer ({_one_line(error)}); give the original checkpoint "
            "instead of the GGUF file"
        ) from error
    _check_some(tokenizer, file)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raise `CheckpointError` if the folder has no tokenizer, or if one of its files is damaged."""
    exists = {name: (folder / name).is_file() for name in _JSON_FILES}
    if exists["vocab.json"] and not (exists["tokenizer.json"] or (folder / "merges.txt").is_file()):
        raise CheckpointError(f"{folder} has vocab.json and no merges.txt; put merges.txt beside it, {_OR_IDS}")
    if not exists["tokenizer.json"] and not exists["vocab.json"] and not list(_vocabularies(folder)):
        raise CheckpointError(f"{folder} has no tokenizer; put tokenizer.json beside the weights, {_OR_IDS}")
    for name in _JSON_FILES:
        if exists[name]:
            read_plain_json_file(folder / name)
    for pattern in _TEXT_FILES:
        for file in folder.glob(pattern):
            check_plain_utf8(file)


def _check_tokens(tokenizer: Any, folder: Path) -> None:
    """Raise `CheckpointError` if the loaded tokenizer gives other tokens than the folder's tokenizer.json."""
    from tokenizers import Tokenizer

    _check_some(tokenizer, folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    stored = Tokenizer.from_file(str(file))
    stored.no_truncation()
    stored.no_padding()
    if _probe(tokenizer) != stored.encode(_PROBE, add_special_tokens=False).ids:
        raise CheckpointError(
            f"{folder}: transformers loads its tokenizer as {type(tokenizer).__name__}, which gives other tokens than "
            'tokenizer.json; set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, or use a newer '
            "transformers"
        )


def _check_some(tokenizer: Any, where: Path) -> None:
    """Raise `CheckpointError` for a tokenizer without vocabulary: transformers may return one if files are missing."""
    if not _probe(tokenizer):
        raise CheckpointError(
            f"{where}: its tokenizer gives no tokens for plain text; is a vocabulary file missing? Put "
            f"tokenizer.json beside the weights, {_OR_IDS}"
        )


def _probe(tokenizer: Any) -> list[int]:
    return list(tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"])


def _refuse(folder: Path, error: Exception) -> NoReturn:
    """Raise an error that explains why a tokenizer could not be loaded."""
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_plain_json_file(settings):
        raise CheckpointError(
            f"{folder}: its tokenizer needs its own code (auto_map in tokenizer_config.json), which subnibble never "
            "runs; if tokenizer.json is enough, remove auto_map and tokenizer_class; else, if you trust the code, "
            f"save the tokenizer with transformers in a form that has a tokenizer.json, {_OR_IDS}"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        for file in _vocabularies(folder):
            _check_packages(file, error)
    raise CheckpointError(
        f"{folder}: its tokenizer cannot be loaded ({_one_line(error)}); compare its files with the original upload, "
        f"use a newer transformers, {_OR_IDS}"
    ) from error


def _vocabularies(folder: Path) -> Iterator[Path]:
    return (file for pattern in _VOCABULARIES for file in sorted(folder.glob(pattern)) if file.is_file())


def _check_packages(file: Path, error: Exception) -> None:
    """Raise `MissingExtra` if a package for this vocabulary is missing, `CheckpointError` if the file is damaged."""
    content = file.read_bytes()[:64]
    if not content or content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is {'a Git LFS pointer' if content else 'empty'}; fetch it again") from error
    # A SentencePiece file is a protobuf message that begins with its pieces; tiktoken files are base64 lines.
    is_sentencepiece = content.startswith(b"\x0a") or file.suffix == ".spm"
    packages = _MISTRAL if file.name == "tekken.json" else _SENTENCEPIECE if is_sentencepiece else _TIKTOKEN
    missing = [name for name in packages if not _is_installed(_MODULES.get(name, name))]
    if missing:
        raise MissingExtra(
            f"{file}: its tokenizer needs {' and '.join(missing)}: pip install {' '.join(missing)}; or put "
            "tokenizer.json beside it"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    # Its parent package is missing.
    except ModuleNotFoundError:
        return False


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
