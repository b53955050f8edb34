"""Evaluate a checkpoint: load it, score it on a text and count its bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.arguments import check_types, described, plain
from subnibble.calibrate.prompt import prefix_ids
from subnibble.calibrate.tokens import bos_token, check_vocabulary
from subnibble.calibrate.windows import check_positions, evaluation_windows
from subnibble.checkpoint.edit import REPORT, read_report
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.original import check_original
from subnibble.checkpoint.size import cache_bytes, measure
from subnibble.checkpoint.source import Source
from subnibble.errors import BadArgument, BadRecipe, CheckpointError
from subnibble.evaluation.layer_error import layer_errors
from subnibble.evaluation.perplexity import check_vocabularies, score
from subnibble.evaluation.runners import runner_of, torch_runner
from subnibble.generate.choice import check_backend, chosen_backend
from subnibble.generate.prefix import same_prefix_
from subnibble.generate.prepare import prepare_
from subnibble.hf import load_model, memory_bytes
from subnibble.hf.attention import attached_cache
from subnibble.kernels import native
from subnibble.progress import Progress, as_progress
from subnibble.report.clock import Clock, peak_memory
from subnibble.resume import fingerprint
from subnibble.resume.keeper import Keeper
from subnibble.resume.run import checked_resume, printing_run
from subnibble.tensor.cache_scheme import PrefixIds

_TYPES = {
    "text": str, "window": int, "max_windows": (int, type(None)), "device": str, "dtype": str,
    "kv_bits": (int, type(None)), "kv": Mapping, "system_prompt": (str, type(None)),
    "activations": (str, type(None)), "backend": str,
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What a model is evaluated on, and how.

    text: a text file or the name of a data set.
    window: tokens per window.
    max_windows: largest number of windows, None for all.
    device, dtype: device and compute dtype, see `device.py`.
    kv_bits, kv: KV-cache settings that override the checkpoint's, as in `Recipe`; None and {} change nothing.
    system_prompt: prompt before every window, see `calibrate/prompt.py`; the evaluated model computes its keys and
        values. None keeps the checkpoint's prompt.
    activations: "int8" rounds the inputs of linears that the checkpoint keeps at 16 bits; None keeps them.
    """

    text: str
    window: int = 2048
    max_windows: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    kv_bits: int | None = None
    kv: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    activations: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for key in ("text", "device", "dtype", "system_prompt", "activations", "backend"):
            object.__setattr__(self, key, plain(getattr(self, key)))
        check_types(self, _TYPES)
        if self.window < 2 or (self.max_windows is not None and self.max_windows < 1):
            raise BadRecipe(
                f"window is {self.window} and max_windows {self.max_windows}; "
                "--window must be at least 2 and --max-windows at least 1"
            )
        check_backend(self.backend)

    @classmethod
    def of(cls, evaluation: AnyEvaluation) -> Evaluation:
        """Convert a caller's argument to an `Evaluation`: an `Evaluation`, a table of its keys, or its text."""
        if isinstance(evaluation, Evaluation):
            return evaluation
        if isinstance(evaluation, Mapping):
            known = [item.name for item in fields(cls)]
            if unknown := sorted(set(evaluation) - set(known), key=str):
                raise BadRecipe(f"unknown evaluation key {unknown[0]!r}; known: {', '.join(known)}")
            return cls(**{"text": None, **evaluation})
        if isinstance(evaluation, str | Path):
            return cls(str(evaluation))
        raise BadArgument(
            f'evaluation is {described(evaluation)}; give an Evaluation, as Evaluation("wikitext2", window=2048), '
            "a table of its keys, a text file or a named set"
        )

    def windows(self, source: Source, tokenizer: Any, prefix: PrefixIds | None) -> Tensor:
        """Token windows of the text, (count, window) int64.

        source: the model, for its vocabulary and number of positions.
        tokenizer: its tokenizer.
        prefix: the prompt prefix that comes before every window, or None.
        """
        check_positions(self.window, source.config, 0 if prefix is None else len(prefix.ids))
        windows = evaluation_windows(self.text, tokenizer, self.window, self.max_windows)
        check_vocabulary(windows, source.config.vocab_size, self.text)
        bos = bos_token(tokenizer)
        if bos is not None:
            check_vocabulary(torch.tensor([bos]), source.config.vocab_size, "the tokenizer's BOS token")
        return windows


# What Python functions accept as an evaluation.
AnyEvaluation = Evaluation | Mapping[str, Any] | str | Path


def evaluate(
    model: str | Path | Source,
    evaluation: AnyEvaluation,
    reference: str | Path | Source | None = None,
    *,
    layers: bool = False,
    resume: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity, bits, sizes and cost of a model, and its distance from a reference.

    model: a packed or plain checkpoint.
    evaluation: the text and settings.
    reference: the original model, or None; it runs with the same system prompt.
    layers: add each packed linear's output error against the reference. Linears stored in another basis (rotated, or
        channels scaled) have none.
    resume: what to do with an earlier evaluation with the same arguments that was killed. "auto": continue it if there
        is one. "never": discard it. "must": raise `BadJournal` if there is none.
    progress: called after each window.

    Returns the results by report key.
    """
    clock, evaluation, on_progress = Clock(), Evaluation.of(evaluation), as_progress(progress)
    resume = checked_resume(resume)
    if layers and reference is None:
        raise BadRecipe("--layers compares with the original; pass --reference MODEL")
    source, reference_source = open_source(model), None if reference is None else open_source(reference, "reference")
    changed = _with_changed_basis(source.path) if layers else set()
    if layers and reference_source is not None:
        check_original(reference_source, source)
    size = measure(source)
    packed, tokenizer = packed_config_of(source.config), source.load_tokenizer()
    prompt = None if evaluation.system_prompt is None else prefix_ids(evaluation.system_prompt, tokenizer)
    windows = evaluation.windows(source, tokenizer, prompt or (None if packed is None else packed.prefix))
    loaded = load_model(source, evaluation.dtype, evaluation.device)
    prepare_(loaded, evaluation.kv_bits, evaluation.kv, prompt, evaluation.activations)
    reference_model = (
        None if reference_source is None else load_model(reference_source, evaluation.dtype, evaluation.device)
    )
    if reference_model is not None:
        check_vocabularies(loaded, reference_model)
        same_prefix_(loaded, reference_model)
    target = {
        "model": fingerprint.files(source.files()),
        "reference": None if reference_source is None else fingerprint.files(reference_source.files()),
        "evaluation": asdict(evaluation),
        "tokens": fingerprint.tokens(windows),
        "versions": fingerprint.versions(),
        "machine": fingerprint.machine(loaded.device),
    }
    with printing_run("evaluate", target, resume) as run:
        journal = None if run is None else run.journal
        if journal is not None and (earlier := journal.value("windows")) is not None:
            clock.add(earlier["seconds"])
        keeper = Keeper(journal, "windows", lambda: {"seconds": clock.seconds()})
        runner, of_reference = runner_of(loaded, evaluation.backend), None
        if reference_model is not None:
            of_reference = torch_runner(reference_model)
        scores = score({"model": runner}, windows, bos_token(tokenizer), of_reference, on_progress, keeper)["model"]
        # Inside the run: the scores are kept until these errors are there, too.
        errors = {"output_errors": layer_errors(loaded, reference_model, windows, changed)} if layers else {}
    results = scores.to_dict() | size.to_dict()
    results |= {
        "text": evaluation.text,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "activations": evaluation.activations or "as stored",
        "kernels": native.isa(),
        "backend": chosen_backend(loaded, evaluation.backend)[0],
        "memory_bytes": memory_bytes(loaded),
        **_attached_facts(loaded),
    }
    return results | errors | {"seconds": clock.seconds()["total"], "peak_memory": peak_memory()}


def _attached_facts(model: Any) -> dict[str, Any]:
    """KV-cache bytes per token and number of prefix tokens of the evaluated model."""
    attached = attached_cache(model)
    if attached is None:
        return {"cache_bytes": cache_bytes(model.config, None), "prefix_tokens": 0}
    tokens = 0 if attached.prefix is None else len(attached.prefix.ids)
    return {"cache_bytes": cache_bytes(model.config, attached.scheme), "prefix_tokens": tokens}


def _with_changed_basis(folder: Path) -> set[str]:
    """Paths of the linears that are stored in another basis than the original's, according to report.json."""
    file, report = folder / REPORT, read_report(folder)
    if not report:
        raise BadRecipe(
            f"--layers needs {file}, which lists the linears that can be compared; evaluate a folder that "
            "`subnibble quantize` wrote"
        )
    try:
        linears = report["linears"]
        changed = {linear["path"] for linear in linears if linear["basis_changed"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); quantize the model again") from error
    if len(changed) == len(linears):
        raise BadRecipe(
            f"--layers: all linears of {folder} are stored in another basis than the original's (rotated, or channels "
            "scaled); read their errors, measured during quantization, in report.json"
        )
    return changed
