"""The end of a quantization, after all weights are on disk: config, recipe, distillation, report."""

from __future__ import annotations

from subnibble.checkpoint.checksums import CHECKSUMS, weights_checksum
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.size import measure
from subnibble.checkpoint.writer import CheckpointWriter
from subnibble.distill.train import distill
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.marking import marked
from subnibble.pipeline.journal import QuantizationJournal
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.streams import prefix_length
from subnibble.pipeline.survey import Survey
from subnibble.progress import Progress
from subnibble.report import DistillReport, Report, SampledReport
from subnibble.report.clock import Clock
from subnibble.version import __version__


def write_config(writer: CheckpointWriter, resolved: Resolved, packed: PackedConfig) -> None:
    """Write config.json, recipe.toml and the index of the shards: from here on the folder is a complete checkpoint.

    packed: specs of all packed modules, the KV cache and the prompt prefix.
    """
    write_model_config(writer, resolved.skeleton, packed)
    writer.write_text("recipe.toml", resolved.recipe.to_toml())
    writer.finish_weights()


def tune_whole(
    writer: CheckpointWriter,
    resolved: Resolved,
    surveyed: Survey,
    packed: PackedConfig,
    journal: QuantizationJournal,
    clock: Clock,
    progress: Progress,
) -> DistillReport | None:
    """Distill the original model into the written checkpoint, and rewrite the tensors that were learned.

    Return its report, or None if the recipe does not ask for distillation.
    """
    recipe, skeleton = resolved.recipe, resolved.skeleton
    if recipe.distillation is None or surveyed.windows is None:
        return None
    tuned = journal.distilled
    if tuned is None:
        with clock.step("distill"):
            tuned = distill(
                skeleton.source, SafetensorsSource(writer.folder), packed, recipe.distillation, surveyed.windows,
                skeleton.dtype, skeleton.device, recipe.seed, journal.keeper(), progress,
            )  # fmt: skip
        journal.record_distilled(tuned)
    with clock.step("write"):
        writer.rewrite(tuned.tensors, journal.record_checksum)
        write_model_config(writer, skeleton, tuned.config)
    return tuned.report


def write_report(
    writer: CheckpointWriter,
    resolved: Resolved,
    surveyed: Survey,
    journal: QuantizationJournal,
    distilled: DistillReport | None,
    sampled: SampledReport | None,
    clock: Clock,
) -> Report:
    """Write report.json and return the report.

    distilled: report of the distillation, or None.
    sampled: report of windows that the model wrote, or None.
    """
    report = Report(
        model=str(resolved.skeleton.source.path),
        method=resolved.recipe.method,
        version=__version__,
        linears=tuple(linear for block in journal.blocks for linear in block.linears),
        size=measure(open_source(writer.folder)).to_dict(),
        calibration_tokens=0 if surveyed.windows is None else surveyed.windows.numel(),
        prefix_tokens=prefix_length(surveyed.prefix),
        seconds=clock.seconds(),
        peak_memory=journal.peak_memory,
        weights_sha256=weights_checksum(writer.checksums),
        blocks=tuple(block.tuned for block in journal.blocks if block.tuned is not None),
        distilled=distilled,
        sampled=sampled,
    )
    writer.write_json("report.json", report.to_dict())
    return report


def write_model_config(writer: CheckpointWriter, skeleton: Skeleton, packed: PackedConfig) -> None:
    """Write config.json of a packed model, with the checksums of the shards written so far."""
    config = skeleton.config.to_diff_dict()
    config["tie_word_embeddings"] = skeleton.tied
    config["quantization_config"] = packed.to_dict() | {CHECKSUMS: writer.checksums}
    config["dtype"] = str(skeleton.source.config.dtype or skeleton.dtype).removeprefix("torch.")
    config.pop("_name_or_path", None)
    writer.write_json("config.json", marked(config))
