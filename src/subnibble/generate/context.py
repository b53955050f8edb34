"""A sequence in a slot of a backend together with its token ids, so that a new text can keep what it shares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from subnibble.generate.backend import Backend


class Context:
    """A slot and the token ids in it.

    backend: runs the model.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.slot = backend.open()
        self.ids: list[int] = []

    def rewind(self, text: Sequence[int]) -> int:
        """Keep the longest beginning that the slot shares with a text, and drop the other tokens.

        text: token ids. Its last token is always left to run, for its logits.
        Returns the number of tokens kept. It is 0 if the cache cannot drop the others (`CacheScheme.can_crop`).
        """
        shared = 0
        while shared < min(len(self.ids), len(text) - 1) and self.ids[shared] == text[shared]:
            shared += 1
        scheme = self._backend.scheme
        if scheme is not None and not scheme.can_crop(len(self.ids), shared):
            shared = 0
            self.forget()
        else:
            self._backend.crop(self.slot, shared)
        self.ids = self.ids[:shared]
        return shared

    def restore(self, state: Mapping[str, Tensor], ids: Sequence[int]) -> None:
        """Replace the sequence by a saved one. state: from `Backend.save`. ids: its tokens."""
        slot = self._backend.load(state)
        self._backend.close(self.slot)
        self.slot, self.ids = slot, list(ids)

    def forget(self) -> None:
        """Begin an empty sequence in place of this one."""
        self._backend.close(self.slot)
        self.slot, self.ids = self._backend.open(), []

    def close(self) -> None:
        """Free the slot; the context must not be used afterwards."""
        self._backend.close(self.slot)
