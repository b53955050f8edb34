"""`subnibble generate` and `subnibble chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subnibble.cli import options as o
from subnibble.cli.streams import say, stream, tell
from subnibble.errors import SubnibbleError

if TYPE_CHECKING:
    from subnibble.generate.chat import Chat
    from subnibble.generate.generator import Generator

_AS_MODEL = "Default: as the model's generation_config.json says"
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help=f"Number of tokens to generate, limited by the model's positions. {_AS_MODEL}, else 256.", min=1),
]
Temperature = Annotated[
    float | None, typer.Option(help=f"Sampling temperature; 0 takes the most likely token. {_AS_MODEL}.", min=0.0)
]
TopK = Annotated[
    int | None, typer.Option(help=f"Draw from this number of most likely tokens; 0: all. {_AS_MODEL}, else 50.", min=0)
]
TopP = Annotated[
    float | None, typer.Option(help=f"Draw from the most likely tokens of this total probability. {_AS_MODEL}, else 1.")
]
MinP = Annotated[
    float | None,
    typer.Option(help=f"Draw from tokens of at least this share of the largest probability. {_AS_MODEL}, else 0."),
]
Penalty = Annotated[
    float | None,
    typer.Option(help=f"Makes tokens that occurred already less likely; 1: does not. {_AS_MODEL}, else 1."),
]
Seed = Annotated[int, typer.Option(help="Seed for sampling.", min=0, max=2**63 - 1)]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends generation and is not printed. May be repeated.")]


def generate(
    model: o.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: MaxNewTokens = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template, as a user's message.")
    ] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: Stop = None,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(help="Keys and values of a prompt: read from FILE if it exists, else written.", metavar="FILE"),
    ] = None,
    kv_bits: o.LoadedKvBits = None,
    kv_option: o.KvOptions = None,
    system_prompt: o.SystemPrompt = None,
    activations: o.Activations = None,
    backend: o.Backend = "auto",
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Generate text: let MODEL continue a prompt."""
    settings = _sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    settings["stop"] = tuple(stop or ())
    generator = _generator(model, kv_bits, kv_option, system_prompt, activations, backend, device, dtype)
    text = [{"role": "user", "content": prompt}] if chat else prompt
    if prompt_cache is not None and not prompt_cache.exists():
        # Settings are checked first, because a long prompt takes time.
        generator.request(generator.tokens(text), _settings(settings))
        tell(f"{prompt_cache}: {generator.save_prompt(prompt_cache, text)} tokens of the prompt saved")
    if not sys.stdout.isatty():
        say(generator.generate(text, prompt_cache=prompt_cache, **settings).text)
        return
    for piece in generator.stream(text, prompt_cache=prompt_cache, **settings):
        stream(piece)
    say("")


def chat(
    model: o.Model,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    kv_bits: o.LoadedKvBits = None,
    kv_option: o.KvOptions = None,
    system_prompt: o.SystemPrompt = None,
    activations: o.Activations = None,
    backend: o.Backend = "auto",
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Chat with MODEL in the terminal; it remembers the conversation.

    /reset forgets it, /system TEXT sets the system turn, /save FILE writes it as JSON, /exit ends. Ctrl-C stops an
    answer.
    """
    from subnibble.generate.chat import Chat

    settings = _sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    _settings(settings)
    conversation = Chat(_generator(model, kv_bits, kv_option, system_prompt, activations, backend, device, dtype))
    if sys.stdin.isatty():
        tell("/reset, /system TEXT, /save FILE, /exit; Ctrl-C stops an answer")
        # Makes `input` remember lines; not on every system.
        with suppress(ImportError):
            import readline  # noqa: F401
    for line in _lines():
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                _obey(line, conversation)
            elif line:
                _answer(conversation, line, settings)
        except SubnibbleError as error:
            # A message that cannot be answered, for example one that is too long, does not end the chat.
            tell(f"error: {error}")


def _lines() -> Iterator[str]:
    """Lines that the user types, until the input ends."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(shown).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("")


def _obey(line: str, conversation: Chat) -> None:
    """Carry out a command: a line that begins with a slash."""
    command, _, argument = line.partition(" ")
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = argument.strip() or None
    elif command == "/save" and argument.strip():
        conversation.save(argument.strip())
        tell(f"{argument.strip()}: {len(conversation.turns)} turns saved")
    else:
        tell(f"{line} is no command; there are /reset, /system TEXT, /save FILE and /exit")


def _answer(conversation: Chat, message: str, settings: dict[str, Any]) -> None:
    with _stopped_by_ctrl_c() as is_stopped:
        for piece in conversation.answer(message, is_stopped, **settings):
            stream(piece)
    say("")


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[Any]:
    """Inside, the first Ctrl-C is only noted: yields a function that tells whether it came. A second one interrupts."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _sampling(
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int,
) -> dict[str, Any]:
    """Options by the names of `Settings`."""
    return dict(locals())


def _settings(values: dict[str, Any]) -> Any:
    from subnibble.generate.settings import Settings

    return Settings.from_dict(values)


def _generator(
    model: str,
    kv_bits: int | None,
    kv_option: list[str] | None,
    system_prompt: str | None,
    activations: str | None,
    backend: str,
    device: str | None,
    dtype: str | None,
) -> Generator:
    from subnibble.generate.generator import Generator

    generator = Generator(
        model, kv_bits=kv_bits, kv=o.kv_settings(kv_option), system_prompt=system_prompt, activations=activations,
        backend=backend, device=device or "auto", dtype=dtype or "auto",
    )  # fmt: skip
    if activations is not None:
        tell(f"inputs of linears: {activations}")
    return generator
