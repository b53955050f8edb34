"""Options that several commands share."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subnibble.cli.streams import tell
from subnibble.errors import BadRecipe

if TYPE_CHECKING:
    from subnibble.recipe import Recipe

PROMPTS = "TEXT|FILE|default|bos"
Model = Annotated[str, typer.Argument(help="Folder, hub id or .gguf file.", metavar="MODEL")]
Device = Annotated[str | None, typer.Option(help="Torch device; default: an accelerator if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16: type to compute in.")]
MethodName = Annotated[str | None, typer.Option("--method", help="See `subnibble list`.")]
Bits = Annotated[int | None, typer.Option(help="Bits of a code: 2, 3, 4 or 8.")]
GroupSize = Annotated[int | None, typer.Option(help="Columns that share a scale; -1: whole row. Default 128.")]
EmbeddingBits = Annotated[int | None, typer.Option(help="Bits of embedding and head: 16, 8 or 4. Default 16.")]
ActivationBits = Annotated[
    int | None, typer.Option(help="Bits of linears' inputs while running: 16, 8, 4 or 3. Default 16: as they are.")
]
ActivationGroupSize = Annotated[
    int | None, typer.Option(help="Channels of an input that share a scale; -1: whole token. Default: as the weights'.")
]
KvBits = Annotated[int | None, typer.Option(help="Bits of the KV cache: 16, 8, 4, 3 or 2. Default 16: as it is.")]
KvOptions = Annotated[
    list[str] | None,
    typer.Option("--kv-option", help="A setting of the KV cache, KEY=VALUE, see `subnibble list`; may be repeated."),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        help="Text (or a file of it) before every text, its keys and values kept at 16 bits; default: the chat "
        "template's own; bos: BOS alone.",
        metavar=PROMPTS,
    ),
]
FoundPrompt = Annotated[
    str | None,
    typer.Option(
        help="Text (or a file of it) before every text, its keys and values kept at 16 bits; default: the chat "
        "template's own; bos: BOS alone; auto: the model's own sink tokens, found in calibration text.",
        metavar=f"{PROMPTS}|auto",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text (.txt, .jsonl), token ids (.npy, .safetensors), or c4, wikitext2, news. Default c4."),
]
NumWindows = Annotated[int | None, typer.Option(help="Calibration windows. Default 128.")]
Window = Annotated[int | None, typer.Option(help="Tokens of a window. Default 2048.")]
DistillSteps = Annotated[
    int | None,
    typer.Option(help="Steps in which the packed model is tuned as a whole towards the original. Default 0."),
]
DistillOptions = Annotated[
    list[str] | None,
    typer.Option("--distill-option", help="A setting of that, KEY=VALUE, see `subnibble list`; may be repeated."),
]
Grid = Annotated[str | None, typer.Option(help="uniform, sign (a scale a bit) or mxfp4. Default: the method's.")]
ZeroPoint = Annotated[str | None, typer.Option(help="none, integer or real, of uniform grids. Default: the method's.")]
Seed = Annotated[int | None, typer.Option(help="Draws the windows and a rotation's signs. Default 0.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML recipe; options given here go over it.")]
Preset = Annotated[
    str | None, typer.Option(help="w2, w3, w4, w4a8, w4a4, mxfp4, w4a4kv4, w3a3kv3 or kv4: our best recipe there.")
]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", help="The method's own setting, KEY=VALUE; may be repeated.")
]
Effort = Annotated[
    str | None, typer.Option(help="fast, default or best: how long methods that tune take. As --option effort=...")
]
Text = Annotated[str, typer.Option(help="Text file (.txt, .jsonl), or wikitext2, news, c4.", metavar="FILE")]
MaxWindows = Annotated[int | None, typer.Option(help="Score at most this many windows. Default: all.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else to stdout.")]


def starting_recipe(path: Path | None, name: str | None, method: str | None, **bits: Any) -> Recipe:
    """What a command line starts from: a file, a preset, a method's defaults or, of bits alone, their preset.

    bits: bits, activation_bits, kv_bits and grid as given. A preset that nobody named is told of.
    """
    from subnibble.presets import preset, preset_for
    from subnibble.recipe import Recipe

    if name is not None and (path is not None or method is not None):
        raise BadRecipe(f"--preset {name} is a whole recipe; give it without {'--recipe' if path else '--method'}")
    if path is not None:
        return Recipe.from_toml(path)
    if name is not None:
        return preset(name)
    if method is not None:
        return Recipe()
    found = preset_for(**bits)
    tell(f"no method is given: this is --preset {found}, by {preset(found).method}")
    return preset(found)


def build_recipe(
    recipe: Recipe | None,
    options: list[str] | None,
    kv_options: list[str] | None = None,
    distill_options: list[str] | None = None,
    **given: Any,
) -> Recipe:
    """A recipe, or the default one, with what the command line gives going over it."""
    from subnibble.recipe import Recipe

    recipe = Recipe() if recipe is None else recipe
    values = recipe.to_dict() | {key: value for key, value in given.items() if value is not None}
    changed = values["method"] != recipe.method
    kept = {} if changed else dict(recipe.options)
    values["options"] = kept | dict(_parse_option(option) for option in options or [])
    values["kv"] = {**recipe.kv, **kv_settings(kv_options)}
    learned = (_parse_option(option, "--distill-option", "rate=0.02") for option in distill_options or [])
    values["distill"] = {**recipe.distill, **dict(learned)}
    return Recipe.from_dict(values)


def with_effort(options: list[str] | None, effort: str | None) -> list[str]:
    """The options, and the effort as one of them."""
    return [*(options or []), *([] if effort is None else [f"effort={effort}"])]


def kv_settings(options: list[str] | None) -> dict[str, Any]:
    """The settings of the KV cache that a command line gives."""
    return dict(_parse_option(option, "--kv-option", "window=32") for option in options or [])


def options_of(method: str, options: list[str] | None) -> list[str]:
    """The options, as KEY=VALUE, that a method has."""
    from subnibble.methods import find_method

    own = find_method(method).options()
    return [text for text in options or [] if hasattr(own, _parse_option(text)[0])]


def check_options(methods: list[str], options: list[str] | None) -> None:
    """Raise `BadRecipe` for an option that none of the methods has."""
    for text in options or []:
        if not any(options_of(method, [text]) for method in methods):
            raise BadRecipe(f"--option {text!r}: none of {', '.join(methods)} has it; see `subnibble list`")


def _parse_option(text: str, flag: str = "--option", example: str = "order=natural") -> tuple[str, Any]:
    """KEY=VALUE with VALUE as in TOML; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadRecipe(f"{flag} {text!r}: give KEY=VALUE, for example {example}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
