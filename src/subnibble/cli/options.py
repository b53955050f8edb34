"""Options that several commands share."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subnibble.cli.streams import tell
from subnibble.errors import BadRecipe

if TYPE_CHECKING:
    from subnibble.recipe import Recipe

PROMPTS = "TEXT|FILE|default|bos"
Model = Annotated[str, typer.Argument(help="Folder, hub id or .gguf file.", metavar="MODEL")]
Device = Annotated[
    str | None, typer.Option(help="Torch device. Default: an accelerator if there is one, else the CPU.")
]
Dtype = Annotated[str | None, typer.Option(help="Dtype of computation: auto, float32, bfloat16 or float16.")]
MethodName = Annotated[str | None, typer.Option("--method", help="Quantization method; `subnibble list` shows all.")]
Bits = Annotated[int | None, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Input columns of a weight that share a scale; -1: whole row. Default 128.")
]
EmbeddingBits = Annotated[
    int | None, typer.Option(help="Bits of the embedding and the head: 16 (not quantized), 8 or 4. Default 16.")
]
ActivationBits = Annotated[
    int | None, typer.Option(help="Bits of the inputs of linear layers: 16 (not quantized), 8, 4 or 3. Default 16.")
]
ActivationGroupSize = Annotated[
    int | None, typer.Option(help="Channels of an input that share a scale; -1: whole token. Default: --group-size.")
]
_KV_BITS = "Bits of the KV cache: 16 (not quantized), 8, 4, 3 or 2."
KvBits = Annotated[int | None, typer.Option(help=f"{_KV_BITS} Default 16.")]
Activations = Annotated[
    str | None,
    typer.Option(
        help="int8: round inputs that MODEL keeps at 16 bits to 8, which is faster and costs accuracy. Default: as "
        "stored."
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="What runs packed models: native (C++ step), torch, or auto (native where it can).", metavar="NAME"
    ),
]
LoadedKvBits = Annotated[int | None, typer.Option(help=f"{_KV_BITS} Default: as MODEL was quantized.")]
KvOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-option", help="Setting of the KV cache, KEY=VALUE; `subnibble list` shows all. May be repeated."
    ),
]
_SYSTEM_PROMPT = (
    "System prompt before every text, as text or a text file; its keys and values stay at 16 bits. default: the system "
    "turn of the chat template; bos: the BOS token alone"
)
SystemPrompt = Annotated[str | None, typer.Option(help=f"{_SYSTEM_PROMPT}.", metavar=PROMPTS)]
# "auto" needs calibration data, so only quantizing has it.
PromptOrAuto = Annotated[
    str | None,
    typer.Option(
        help=f"{_SYSTEM_PROMPT}; auto: the attention-sink tokens of the model, found in the calibration data.",
        metavar=f"{PROMPTS}|auto",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Calibration data: text (.txt, .jsonl), token ids (.npy, .safetensors), c4, wikitext2, news, or self: "
        "the model writes it. Default c4."
    ),
]
SamplingOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--sampling-option",
        help="Setting of --calibration self, KEY=VALUE; `subnibble list` shows all. May be repeated.",
    ),
]
NumWindows = Annotated[int | None, typer.Option(help="Number of calibration windows. Default 128.")]
Window = Annotated[int | None, typer.Option(help="Tokens of a window. Default 2048.")]
DistillSteps = Annotated[
    int | None,
    typer.Option(
        help="Steps of distillation: tune the whole packed model towards the original's predictions. Default 0."
    ),
]
DistillOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--distill-option", help="Setting of distillation, KEY=VALUE; `subnibble list` shows all. May be repeated."
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(help="Grid of the weights: uniform, sign (one scale per bit) or mxfp4. Default: the method's choice."),
]
ZeroPoint = Annotated[
    str | None, typer.Option(help="Zero-point of uniform grids: none, integer or real. Default: the method's choice.")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed for choosing or writing windows and the signs of rotations. Default 0.")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="Recipe, a TOML file; options on the command line override it.")
]
Preset = Annotated[
    str | None,
    typer.Option(help="Our best recipe for these bits: w2, w3, w4, w4a8, w4a4, mxfp4, w4a4kv4, w3a3kv3 or kv4."),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the method, KEY=VALUE; `subnibble list` shows all. May be repeated."),
]
Effort = Annotated[
    str | None,
    typer.Option(
        help="Time that a method spends on tuning blocks: fast, default or best. Short for --option effort=..."
    ),
]
Text = Annotated[
    str, typer.Option(help="Text to score: a file (.txt, .jsonl), or wikitext2, news, c4.", metavar="FILE")
]
Resume = Annotated[
    str,
    typer.Option(
        help="What to do with the unfinished work of an earlier run of this command: auto continues it, never discards "
        "it, must stops if there is none.",
        metavar="auto|never|must",
    ),
]
MaxWindows = Annotated[int | None, typer.Option(help="Largest number of windows to score. Default: all.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else to stdout.")]


def starting_recipe(path: Path | None, name: str | None, method: str | None, **bits: Any) -> Recipe:
    """The recipe before the command line changes it: a file, a preset, or the defaults if a method is named.

    If none of the three is named, it is the preset for the given bits, and stderr names it.

    path: --recipe.
    name: --preset.
    method: --method.
    bits: --bits, --activation-bits, --kv-bits and --grid by their names, None if not given.
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
    matching = preset_for(**bits)
    tell(f"no method is given: using --preset {matching}, whose method is {preset(matching).method}")
    return preset(matching)


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe that a command line asks for.

    settings: values of `RECIPE_OPTIONS` by name; None: not on the command line.
    """
    values = dict(settings)
    bits = {name: values[name] for name in ("bits", "activation_bits", "kv_bits", "grid")}
    start = starting_recipe(values.pop("recipe"), values.pop("preset"), values["method"], **bits)
    return build_recipe(start, with_effort(values.pop("option"), values.pop("effort")), **values)


def build_recipe(
    recipe: Recipe | None,
    options: list[str] | None,
    kv_option: list[str] | None = None,
    distill_option: list[str] | None = None,
    sampling_option: list[str] | None = None,
    **settings: Any,
) -> Recipe:
    """A recipe changed by the settings of the command line.

    If the command line changes the method, the options of the old method are dropped. If it changes the calibration
    data, the settings of --calibration self are.

    recipe: the recipe to change; None: the default one.
    options: --option, KEY=VALUE each, or None.
    kv_option: --kv-option, KEY=VALUE each, or None.
    distill_option: --distill-option, KEY=VALUE each, or None.
    sampling_option: --sampling-option, KEY=VALUE each, or None.
    settings: recipe key -> value; None: not given.
    """
    from subnibble.recipe import Recipe

    recipe = Recipe() if recipe is None else recipe
    values = recipe.to_dict() | {key: value for key, value in settings.items() if value is not None}
    changed = values["method"] != recipe.method
    base = {} if changed else dict(recipe.options)
    values["options"] = base | dict(_parse_option(option) for option in options or [])
    values["kv"] = {**recipe.kv, **kv_settings(kv_option)}
    distill = (_parse_option(option, "--distill-option", "rate=0.02") for option in distill_option or [])
    values["distill"] = {**recipe.distill, **dict(distill)}
    sampling = (_parse_option(option, "--sampling-option", "start=chat") for option in sampling_option or [])
    written = dict(recipe.sampling) if values.get("calibration") == recipe.calibration else {}
    values["sampling"] = {**written, **dict(sampling)}
    return Recipe.from_dict(values)


def with_effort(options: list[str] | None, effort: str | None) -> list[str]:
    """The options (KEY=VALUE each) with --effort added as effort=..., if it is given."""
    return [*(options or []), *([] if effort is None else [f"effort={effort}"])]


def kv_settings(options: list[str] | None) -> dict[str, Any]:
    """Parse --kv-option (KEY=VALUE each) into settings of the KV cache, the fields of `CacheScheme`."""
    return dict(_parse_option(option, "--kv-option", "window=32") for option in options or [])


def options_of(method: str, options: list[str] | None) -> list[str]:
    """Those of the options, KEY=VALUE each, that the method has."""
    from subnibble.methods import find_method

    defaults = find_method(method).options()
    return [text for text in options or [] if hasattr(defaults, _parse_option(text)[0])]


def check_options(methods: list[str], options: list[str] | None) -> None:
    """Raise `BadRecipe` for an option that none of the methods has."""
    for text in options or []:
        if not any(options_of(method, [text]) for method in methods):
            raise BadRecipe(f"--option {text!r}: none of {', '.join(methods)} has it; see `subnibble list`")


def _parse_option(text: str, flag: str = "--option", example: str = "order=natural") -> tuple[str, Any]:
    """Parse KEY=VALUE, with VALUE as in TOML; anything that is no TOML value is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadRecipe(f"{flag} {text!r}: give KEY=VALUE, for example {example}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
