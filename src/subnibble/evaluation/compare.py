"""Compare several quantizations of one model on the same text and windows, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from subnibble.arguments import as_path, described
from subnibble.calibrate.prompt import prefix_ids
from subnibble.calibrate.tokens import bos_token
from subnibble.checkpoint.checksums import file_checksum
from subnibble.checkpoint.config import CONFIG
from subnibble.checkpoint.edit import read_report
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.size import Size, measure, weights_hash
from subnibble.checkpoint.source import Source
from subnibble.checkpoint.writer import check_output, is_packed
from subnibble.device import resolve_device
from subnibble.errors import BadArgument, BadRecipe
from subnibble.evaluation.evaluate import AnyEvaluation, Evaluation
from subnibble.evaluation.perplexity import Scores, score
from subnibble.evaluation.runners import runner_of, torch_runner
from subnibble.generate.prefix import same_prefix_
from subnibble.hf import load_model, memory_bytes
from subnibble.methods import find_method
from subnibble.methods.method import Steps
from subnibble.paths import expanded, is_file
from subnibble.pipeline.check import check_apart, resolve
from subnibble.pipeline.driver import quantize
from subnibble.progress import Progress, as_progress, titled
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.report import Report
from subnibble.resume import fingerprint
from subnibble.resume.journal import Journal, damaged
from subnibble.resume.keeper import Keeper
from subnibble.resume.run import Run, checked_resume, printing_run, remove_leftovers
from subnibble.resume.runs import has_unfinished

ORIGINAL = "original"
# The first step of a comparison, before anything is quantized.
_BEGUN = "begun"


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    name: `recipe_name` of the recipe, or "original".
    effective_bits, model_bits, file_bytes, activation_bits, cache_bytes: see `Size` in `checkpoint/size.py`.
    memory_bytes: size of the loaded model.
    seconds: time to quantize it, None for the original.
    scores: perplexity and distance from the original.
    """

    name: str
    effective_bits: float
    model_bits: float
    file_bytes: int
    activation_bits: float
    cache_bytes: float
    memory_bytes: int
    seconds: float | None
    scores: Scores

    def to_dict(self) -> dict[str, Any]:
        """The row as a flat dictionary that includes the scores."""
        values = asdict(self)
        del values["scores"]
        return values | self.scores.to_dict()


def compare(
    model: str | Path | Source,
    recipes: Sequence[AnyRecipe] | AnyRecipe,
    evaluation: AnyEvaluation,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: str = "auto",
    progress: Progress | None = None,
) -> list[Row]:
    """Quantize a model by each recipe; score all results and the original on the same windows.

    All recipes must have the same system prompt, or none; the original is scored after the same prompt.

    model: folder or name of the unquantized model.
    recipes: the recipes, or a single one.
    evaluation: the text and windows; it sets neither a KV cache nor a system prompt.
    out: folder in which checkpoints are kept, one subfolder per recipe (`recipe_names`); None keeps none.
    overwrite: whether existing checkpoints in `out` may be replaced.
    resume: what to do with the unfinished work of an earlier comparison, as in `quantize`.
    progress: called after each step.

    Returns one row per model, the original first. Raises `BadRecipe` for recipes that cannot be compared.
    """
    on_progress, evaluation, parsed = as_progress(progress), Evaluation.of(evaluation), _recipes(recipes)
    resume = checked_resume(resume)
    out = None if out is None else as_path(out, "out", "a folder to keep the checkpoints in, or leave it out")
    recipes_of = dict(zip(recipe_names(parsed), parsed, strict=True))
    if out is not None and not has_unfinished(out):
        _check_free(out, recipes_of, overwrite)
    prompt = _shared_prompt(parsed, evaluation)
    source = open_source(model)
    reads_text = {}
    for name, recipe in recipes_of.items():
        resolved = resolve(source, recipe).recipe
        if out is not None:
            check_apart(out / name, source.path, (resolved.calibration, resolved.system_prompt))
        reads_text[name] = resolved.calibration is not None
    tokenizer = source.load_tokenizer()
    windows = evaluation.windows(source, tokenizer, None if prompt is None else prefix_ids(prompt, tokenizer))
    target = _fingerprint(source, recipes_of, evaluation, windows)
    with _Work.opened(out, recipes_of, target, overwrite, resume) as work:
        paths: dict[str, Path | Source] = {ORIGINAL: source}
        # Recipes that read calibration text come first, so that unavailable text fails before any other work.
        seconds = {
            name: work.quantize(source, name, recipes_of[name], titled(on_progress, name))
            for name in sorted(recipes_of, key=lambda name: not reads_text[name])
        }
        paths |= {name: work.folder / name for name in recipes_of}
        models = {name: load_model(path, evaluation.dtype, evaluation.device) for name, path in paths.items()}
        if recipes_of:
            same_prefix_(models[next(iter(recipes_of))], models[ORIGINAL])
        keeper = Keeper(work.journal, "windows")
        evaluate = titled(on_progress, "evaluate")
        runners = {name: runner_of(loaded, evaluation.backend) for name, loaded in models.items() if name != ORIGINAL}
        runners = {ORIGINAL: torch_runner(models[ORIGINAL]), **runners}
        scores = score(runners, windows, bos_token(tokenizer), runners[ORIGINAL], evaluate, keeper)
        return [
            _row(name, measure(open_source(path)), memory_bytes(models[name]), seconds.get(name), scores[name])
            for name, path in paths.items()
        ]


@dataclass(frozen=True)
class _Work:
    """The work of a comparison.

    folder: where the checkpoints are written, one subfolder per recipe.
    journal: the finished steps; None if this comparison cannot be resumed.
    overwrite: whether checkpoints in `folder` may be replaced.
    resume: see `compare`.
    """

    folder: Path
    journal: Journal | None
    overwrite: bool
    resume: str

    @classmethod
    @contextmanager
    def opened(
        cls, out: Path | None, names: Iterable[str], target: Mapping[str, Any], overwrite: bool, resume: str
    ) -> Iterator[_Work]:
        """The work of this comparison, or what an earlier one left of it.

        out: folder in which checkpoints are kept, None to keep none.
        names: names of the checkpoints.
        target: the comparison's fingerprint.
        """
        inner = "auto" if resume == "must" else resume
        with ExitStack() as stack:
            if out is not None:
                run: Run | None = stack.enter_context(Run(out, "compare", target, resume))
            else:
                run = stack.enter_context(printing_run("compare", target, resume))
            if run is None:
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="subnibble-compare-"))
                yield cls(Path(temporary), None, overwrite, inner)
                return
            resumed = run.is_resumed
            if not resumed:
                if out is not None:
                    _check_free(out, names, overwrite)
                # From here on, checkpoints that this comparison finds in its folder are its own.
                run.journal.record({_BEGUN: {"replaced": {} if out is None else _configs(out, names)}})
            yield cls(out or run.folder, run.journal, overwrite or resumed, inner)
            run.finish()

    def quantize(self, source: Source, name: str, recipe: Recipe, progress: Progress) -> float:
        """Quantize by one recipe, unless that is done already; return the seconds that it took."""
        path, journal = self.folder / name, self.journal
        done = None if journal is None else journal.value(name)
        if done is not None:
            if not path.is_dir() or weights_hash(path) != done["weights_sha256"]:
                raise damaged(path, ValueError("its weights are not those that were written"))
            return float(done["seconds"])
        if journal is not None and _is_new(path, journal.value(_BEGUN)["replaced"].get(name)):
            # The earlier run was killed after it finished this checkpoint, and before it recorded that.
            report = Report.from_dict(read_report(path))
            remove_leftovers(path)
        else:
            report = quantize(source, path, recipe, overwrite=self.overwrite, resume=self.resume, progress=progress)
        seconds = report.seconds["total"]
        if journal is not None:
            journal.record({name: {"seconds": seconds, "weights_sha256": report.weights_sha256}})
        return seconds


def _check_free(out: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raise `OutputError` if a checkpoint in `out` would be replaced and `overwrite` does not allow it."""
    for name in names:
        check_output(out / name, overwrite)


def _configs(out: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> SHA-256 of config.json, which names that of all weights, of each checkpoint that is in `out` already."""
    return {name: file_checksum(out / name / CONFIG) for name in names if is_packed(out / name)}


def _is_new(path: Path, replaced: str | None) -> bool:
    """Whether a complete checkpoint is at `path`, other than the one that it replaces.

    replaced: SHA-256 of config.json of the one to replace, None if there was none.
    """
    return is_packed(path) and not has_unfinished(path) and file_checksum(path / CONFIG) != replaced


def _fingerprint(
    source: Source, recipes: Mapping[str, Recipe], evaluation: Evaluation, windows: Tensor
) -> dict[str, Any]:
    """Everything that the result of a comparison depends on. windows: (n, t) token ids that are scored."""
    texts = sorted({recipe.calibration for recipe in recipes.values() if recipe.calibration})
    return {
        "model": fingerprint.files(source.files()),
        "recipes": {name: recipe.to_dict() for name, recipe in recipes.items()},
        "calibration": fingerprint.files(expanded(text) for text in texts if is_file(text)),
        "evaluation": asdict(evaluation),
        "tokens": fingerprint.tokens(windows),
        "versions": fingerprint.versions(),
        "machine": fingerprint.machine(resolve_device(evaluation.device)),
    }


def _shared_prompt(recipes: Sequence[Recipe], evaluation: Evaluation) -> str | None:
    """The system prompt of all recipes; `BadRecipe` if they differ, or if the evaluation sets a prompt or a cache."""
    prompts = {recipe.system_prompt for recipe in recipes}
    sets_cache_or_prompt = evaluation.system_prompt is not None or evaluation.kv_bits is not None or evaluation.kv
    if len(prompts) > 1 or sets_cache_or_prompt:
        raise BadRecipe(
            "all compared recipes must have the same system prompt, and the evaluation must set neither a prompt nor a "
            "KV cache; set kv_bits, kv and system_prompt in the recipes"
        )
    return next(iter(prompts), None)


def _row(name: str, size: Size, memory: int, seconds: float | None, scores: Scores) -> Row:
    return Row(
        name, size.effective_bits, size.model_bits, size.file_bytes, size.activation_bits, size.cache_bytes, memory,
        seconds, scores,
    )  # fmt: skip


def _recipes(recipes: Any) -> list[Recipe]:
    """Convert a caller's argument, several recipes or one, to a list of recipes."""
    if isinstance(recipes, Recipe | Mapping | str | Path):
        return [Recipe.of(recipes)]
    if not isinstance(recipes, Iterable):
        raise BadArgument(f"recipes is {described(recipes)}; give a list of recipes")
    return [Recipe.of(recipe) for recipe in recipes]


def recipe_names(recipes: Sequence[Recipe]) -> list[str]:
    """A unique name for each recipe: `recipe_name`, with a number appended to repeated names.

    Raises `BadRecipe` if a recipe occurs twice.
    """
    short = [recipe_name(recipe) for recipe in recipes]
    names = []
    for index, (recipe, name) in enumerate(zip(recipes, short, strict=True)):
        if recipe in recipes[:index]:
            raise BadRecipe(f"{name} is given {recipes.count(recipe)} times; give each recipe once")
        earlier = short[:index].count(name)
        names.append(f"{name}-{earlier + 1}" if earlier else name)
    return names


def recipe_name(recipe: Recipe) -> str:
    """Short name of a recipe for tables and folders: method, schemes and the options that it sets."""
    options = "".join(f"-{key}={value}" for key, value in sorted(recipe.options.items()))
    activation = recipe.activation
    inputs = "" if activation is None else f"-{activation.name}"
    cache = recipe.cache_scheme(_steps(recipe).cache)
    cached = "" if cache is None else f"-{cache.name}"
    distilled = f"-distilled{recipe.distill_steps}" if recipe.distill_steps else ""
    weights = "" if _steps(recipe).rounds_no_weights else f"-{recipe.scheme.name}"
    return f"{recipe.method}{weights}{inputs}{cached}{options}{distilled}"


def _steps(recipe: Recipe) -> Steps:
    return find_method(recipe.method).steps(recipe.options)
