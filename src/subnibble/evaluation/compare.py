"""Several quantizations of one model side by side: the same text, the same windows, one run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subnibble.calibrate.prompt import prefix_ids
from subnibble.calibrate.tokens import bos_token
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.size import measure
from subnibble.checkpoint.source import Source
from subnibble.checkpoint.writer import check_output
from subnibble.errors import BadArgument, BadRecipe
from subnibble.evaluation.evaluate import AnyEvaluation, Evaluation
from subnibble.evaluation.perplexity import Scores, score
from subnibble.generate.prefix import same_prefix_
from subnibble.given import described, given_path
from subnibble.hf import load_model, memory_bytes
from subnibble.methods import find_method
from subnibble.methods.method import Steps
from subnibble.pipeline.check import check_apart, resolve
from subnibble.pipeline.driver import quantize
from subnibble.progress import Progress, given_progress, titled
from subnibble.recipe import AnyRecipe, Recipe

ORIGINAL = "original"


@dataclass(frozen=True)
class Row:
    """One model of the comparison. seconds: to quantize it, None for the original. memory_bytes: loaded."""

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
        """Plain dictionary, scores spliced in."""
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
    progress: Progress | None = None,
) -> list[Row]:
    """Quantize `model` by each recipe and score all of them and the original on the same windows.

    Recipes have one system prompt, or none; the original is scored behind the same. out: where to keep the checkpoints,
    `recipe_names` each; None keeps none.
    """
    told, evaluation, target = given_progress(progress), Evaluation.of(evaluation), _recipes(recipes)
    out = None if out is None else given_path(out, "out", "a folder to keep the checkpoints in, or leave it out")
    names = recipe_names(target)
    for name in names:
        if out is not None:
            check_output(out / name, overwrite)
    prompts = {recipe.system_prompt for recipe in target}
    own = evaluation.system_prompt is not None or evaluation.kv_bits is not None or evaluation.kv
    if len(prompts) > 1 or own:
        raise BadRecipe("models side by side have one system prompt, and cache and prompt come with their recipes")
    source = open_source(model)
    reads_text = {}
    for name, recipe in zip(names, target, strict=True):
        resolved = resolve(source, recipe).recipe
        if out is not None:
            check_apart(out / name, source.path, resolved)
        reads_text[name] = resolved.calibration is not None
    tokenizer = source.load_tokenizer()
    prompt = next(iter(prompts), None)
    windows = evaluation.windows(source, tokenizer, None if prompt is None else prefix_ids(prompt, tokenizer))
    bos = bos_token(tokenizer)
    with _folder(out) as folder:
        seconds: dict[str, float | None] = {ORIGINAL: None}
        paths: dict[str, Path | Source] = {ORIGINAL: source} | {name: folder / name for name in names}
        # Recipes that read text first, so that text which cannot be had is known before any work.
        named = zip(names, target, strict=True)
        for name, recipe in sorted(named, key=lambda pair: not reads_text[pair[0]]):
            report = quantize(source, folder / name, recipe, overwrite=overwrite, progress=titled(told, name))
            seconds[name] = report.seconds["total"]
        models = {name: load_model(path, evaluation.dtype, evaluation.device) for name, path in paths.items()}
        if names:
            same_prefix_(models[names[0]], models[ORIGINAL])
        scores = score(models, windows, bos, models[ORIGINAL], titled(told, "evaluate"))
        rows = []
        for name, path in paths.items():
            size = measure(open_source(path))
            memory = memory_bytes(models[name])
            rows.append(
                Row(
                    name,
                    size.effective_bits,
                    size.model_bits,
                    size.file_bytes,
                    size.activation_bits,
                    size.cache_bytes,
                    memory,
                    seconds[name],
                    scores[name],
                )
            )
    return rows


def _recipes(given: Any) -> list[Recipe]:
    """The recipes that a caller means: several, or one alone."""
    if isinstance(given, Recipe | Mapping | str | Path):
        return [Recipe.of(given)]
    if not isinstance(given, Iterable):
        raise BadArgument(f"recipes is {described(given)}; give a list of recipes")
    return [Recipe.of(one) for one in given]


def recipe_names(recipes: Sequence[Recipe]) -> list[str]:
    """A name for each; of those that `recipe_name` does not tell apart, the later ones with a number behind it."""
    plain = [recipe_name(recipe) for recipe in recipes]
    names = []
    for index, (recipe, name) in enumerate(zip(recipes, plain, strict=True)):
        if recipe in recipes[:index]:
            raise BadRecipe(f"{name} is asked for {recipes.count(recipe)} times; name each method and width once")
        before = plain[:index].count(name)
        names.append(f"{name}-{before + 1}" if before else name)
    return names


def recipe_name(recipe: Recipe) -> str:
    """Short name of a recipe, for tables and folders: method, schemes, options as given."""
    options = "".join(f"-{key}={value}" for key, value in sorted(recipe.options.items()))
    activation = recipe.activation
    inputs = "" if activation is None else f"-{activation.name}"
    cache = recipe.cache_scheme(_steps(recipe).cache)
    cached = "" if cache is None else f"-{cache.name}"
    distilled = f"-distilled{recipe.distill_steps}" if recipe.distill_steps else ""
    weights = "" if _steps(recipe).leaves_weights else f"-{recipe.scheme.name}"
    return f"{recipe.method}{weights}{inputs}{cached}{options}{distilled}"


def _steps(recipe: Recipe) -> Steps:
    return find_method(recipe.method).steps(recipe.options)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="subnibble-compare-") as temporary:
        yield Path(temporary)
