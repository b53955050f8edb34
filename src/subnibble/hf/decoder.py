"""Run a loaded model by the C++ decoder step: built from the site tables, one call for all tokens of a step.

The decoder shares the packed weights of the model's linears, which are repacked once for both. Hidden states are
float32. Inputs of linears without an activation scheme are rounded to fixed point, as `runtime/native.py` rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subnibble.arch.site import Heads
from subnibble.errors import BadRecipe, UnsupportedModel
from subnibble.hf.attention import attached_cache
from subnibble.hf.decoder_parts import DecoderParts
from subnibble.hf.sequence_state import SequenceForm
from subnibble.kernels import native as kernels
from subnibble.model.transformers_api.decoder import Angles, gate_name
from subnibble.runtime.offloaded import has_hook
from subnibble.tensor.cache_scheme import CacheScheme

# Positions whose cosines and sines are computed at first.
_FIRST_POSITIONS = 2048


def why_not(model: Any) -> str | None:
    """Why the decoder step cannot run a model, in a few words; None if it can."""
    if reason := kernels.why_missing():
        return reason
    if kernels.isa() == kernels.TORCH:
        return "torch operations were chosen"
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return "a part of the model is not on the CPU"
    if any(has_hook(module) for module in model.modules()):
        return "a part of the model is offloaded"
    if gate_name(model.config) is None:
        return f"no kernel for the activation function {getattr(model.config, 'hidden_act', None)!r}"
    heads = Heads.of(model.config)
    if heads.width > 256 or heads.width % 2:
        return f"no kernel for heads of {heads.width} channels"
    return None


class Decoder:
    """A model that runs by the C++ decoder step.

    One thread at a time may call it.

    model: a loaded transformers model; its modules must not change afterwards.
    fixed_bytes: bytes of the fixed-point numbers of inputs without a scheme, 2 or 3. None: 3 for float32 models, else
        2.
    Raises `UnsupportedModel` if the step cannot run the model.
    """

    def __init__(self, model: Any, fixed_bytes: int | None = None) -> None:
        if reason := why_not(model):
            raise UnsupportedModel(f"the native decoder step cannot run this model: {reason}")
        self.vocab_size = int(model.config.vocab_size)
        attached = attached_cache(model)
        self.scheme: CacheScheme | None = None if attached is None else attached.scheme
        self.prefix = None if attached is None else attached.prefix
        builder = DecoderParts(model, fixed_bytes or (3 if model.dtype == torch.float32 else 2))
        self._angles = Angles.of(builder.decoder)
        self._native = builder.build(self._angles.read(0, 1)[0].shape[1], self.scheme)
        # What addresses in the C++ object point to.
        self._held = builder.held
        self._positions = 0
        self._prefix_tokens = builder.prefix_tokens
        self._form = SequenceForm(self.scheme, builder.heads, builder.num_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences' keys and values."""
        return int(self._native.nbytes)

    def open(self) -> Any:
        """A new empty sequence, which has `length`, `crop`, `save` and `load`."""
        return self._native.open()

    def forward(self, sequences: Sequence[Any], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to sequences; returns the logits after each one's last token, (b, vocab_size) float32.

        sequences: of `open`, each once.
        tokens: token ids for each, at least one.
        """
        logits = torch.empty(len(sequences), self.vocab_size)
        if self._angles.changes and len(sequences) > 1:
            # Frequencies depend on the length of one text.
            for row, pair in enumerate(zip(sequences, tokens, strict=True)):
                self._run([(*pair, False)], logits[row : row + 1])
        else:
            self._run([(sequence, ids, False) for sequence, ids in zip(sequences, tokens, strict=True)], logits)
        return logits

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Run a text as a sequence that is not kept; returns the logits after each token, (t, vocab_size) float32."""
        logits = torch.empty(len(tokens), self.vocab_size)
        self._run([(self.open(), tokens, True)], logits)
        return logits

    def save(self, sequence: Any) -> dict[str, Tensor]:
        """Copies of a sequence's keys and values, as `generate/backend.py` describes them."""
        return self._form.read(sequence)

    def load(self, state: Mapping[str, Tensor]) -> Any:
        """A new sequence with the keys and values that `save` returned. Raises `BadRecipe` if they do not fit."""
        sequence, tokens = self.open(), self._form.tokens(state)
        if self.scheme is not None and self.scheme.rope == "before":
            if self._angles.changes:
                raise BadRecipe("positions of this model depend on the length of the text: its keys cannot be loaded")
            cos, sin = self._angles.read(self._prefix_tokens, self._prefix_tokens + tokens)
            sequence.place_angles(cos.data_ptr(), sin.data_ptr(), tokens, cos.shape[1])
        sequence.reserve(tokens)
        self._form.write(sequence, state)
        sequence.advance(tokens)
        return sequence

    def _run(self, appends: list[tuple[Any, Sequence[int], bool]], logits: Tensor) -> None:
        ends = [self._prefix_tokens + sequence.length + len(ids) for sequence, ids, _ in appends]
        self._prepare_positions(min(end - len(ids) for end, (_, ids, _) in zip(ends, appends, strict=True)), max(ends))
        arguments = [(sequence, list(ids), all_logits) for sequence, ids, all_logits in appends]
        self._native.forward(arguments, torch.get_num_threads(), logits.data_ptr())

    def _prepare_positions(self, start: int, stop: int) -> None:
        """Give the step cosines and sines of positions start .. stop - 1."""
        if stop > self._positions:
            self._positions = max(stop, 2 * self._positions, _FIRST_POSITIONS)
            known = min(self._positions, _FIRST_POSITIONS) if self._angles.changes else self._positions
            cos, sin = self._angles.read(0, known)
            if known < self._positions:
                cos, sin = (
                    torch.cat([half, half.new_empty(self._positions - known, half.shape[1])]) for half in (cos, sin)
                )
            self._table = cos, sin
            self._native.set_angles(cos.data_ptr(), sin.data_ptr(), self._positions)
        if self._angles.changes:
            for half, new in zip(self._table, self._angles.read(start, stop), strict=True):
                half[start:stop] = new
