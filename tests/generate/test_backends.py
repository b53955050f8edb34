"""Sequences in slots: chunked equals at once, together equals alone, cropped and loaded ones go on as they would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import CACHES, model_with

from conftest import CONFIGS
from subnibble.generate.backend import Backend
from subnibble.generate.native_backend import NativeBackend
from subnibble.generate.torch_backend import TorchBackend
from subnibble.kernels import native as kernels

IDS = [(7 * i * i + 3) % 95 for i in range(30)]
EACH = [(cache, prefixed) for cache in CACHES for prefixed in (False, True) if (cache, prefixed) != ("dynamic", True)]


BACKENDS: dict[str, Any] = {"torch": TorchBackend}
if kernels.why_missing() is None:
    BACKENDS["native"] = NativeBackend


@pytest.fixture(params=BACKENDS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the backend that a test runs on."""
    monkeypatch.setitem(BACKENDS, "tested", BACKENDS[request.param])
    return BACKENDS["tested"]


def backend_on(cache: str, prefixed: bool) -> Backend:
    backend: Backend = BACKENDS["tested"](model_with(cache, prefixed))
    return backend


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Sums in another order move a float16 scale of the cache by its last bit, which is 5e-4.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("cache", "prefixed"), EACH)
def test_chunks_give_the_logits_of_the_whole_text(cache: str, prefixed: bool) -> None:
    backend = backend_on(cache, prefixed)
    expected = backend.logits(IDS)
    assert expected.shape == (len(IDS), backend.vocab_size)
    slot, done = backend.open(), 0
    for size in (1, 12, 1, 16):
        logits = backend.forward([slot], [IDS[done : done + size]])
        done += size
        close(logits[0], expected[done - 1])
        assert backend.length(slot) == done
    # The test can fail: other tokens have other logits.
    assert float((logits[0] - expected[done - 2]).abs().max()) > 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("cache", CACHES)
def test_sequences_do_not_see_each_other(cache: str) -> None:
    backend = backend_on(cache, prefixed=True)
    texts = [IDS[:9], IDS[4:25], IDS[2:3]]
    alone = [backend.forward([backend.open()], [text])[0] for text in texts]
    slots = [backend.open() for _ in texts]
    assert torch.equal(backend.forward(slots, texts), torch.stack(alone))
    backend.close(slots[1])
    together = backend.forward([slots[2], slots[0]], [IDS[3:6], IDS[9:12]])
    whole = [backend.forward([backend.open()], [text])[0] for text in (IDS[2:6], IDS[:12])]
    close(together, torch.stack(whole))


@pytest.mark.parametrize(("cache", "prefixed"), EACH)
def test_a_loaded_sequence_goes_on_like_the_saved_one(cache: str, prefixed: bool) -> None:
    backend = backend_on(cache, prefixed)
    slot = backend.open()
    backend.forward([slot], [IDS[:20]])
    state = backend.save(slot)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    assert all(tensor.is_contiguous() for tensor in state.values())
    again = backend_on(cache, prefixed)
    loaded = again.load(state)
    assert again.length(loaded) == 20
    for start, stop in ((20, 21), (21, 30)):
        expected = backend.forward([slot], [IDS[start:stop]])
        assert torch.equal(again.forward([loaded], [IDS[start:stop]]), expected)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.items())
    empty = again.load(again.save(again.open()))
    assert again.length(empty) == 0


@pytest.mark.parametrize(("cache", "prefixed"), EACH)
def test_a_cropped_sequence_goes_on_as_if_the_rest_had_never_been(cache: str, prefixed: bool) -> None:
    backend = backend_on(cache, prefixed)
    scheme = backend.scheme
    for length, target in ((20, 12), (20, 0), (14, 14), (20, 18)):
        slot = backend.open()
        backend.forward([slot], [IDS[:length]])
        if scheme is not None and not scheme.can_crop(length, target) and target:
            with pytest.raises(ValueError, match="they cannot return to 16 bits"):
                backend.crop(slot, target)
            continue
        backend.crop(slot, target)
        assert backend.length(slot) == target
        fresh = backend.open()
        expected = backend.forward([fresh], [[*IDS[:target], 3, 1, 4]])
        close(backend.forward([slot], [[3, 1, 4]]), expected)
        # The test can fail: a token less changes the logits.
        backend.crop(fresh, 0)
        other = backend.forward([fresh], [[*IDS[: max(target - 1, 0)], 1, 4]])
        assert float((other - expected).abs().max()) > 0.02 * float(expected.abs().max())


def test_the_ends_of_positions_exclude_the_prefix() -> None:
    assert backend_on("dynamic", prefixed=False).max_positions == 128
    assert backend_on("16 bits", prefixed=True).max_positions == 125


@pytest.mark.parametrize("name", CONFIGS)
def test_a_backend_hides_no_token_that_repeats_the_prefix(name: str) -> None:
    backend: Any = BACKENDS["tested"](model_with("by token", prefixed=True, name=name))
    assert backend.prefix.repeated([5, 9, 2, 7]) == 3
    slot, other = backend.open(), backend.open()
    repeated = backend.forward([slot], [[5, 9, 2, 7]])
    assert backend.length(slot) == 4
    alone = backend.forward([other], [[7]])
    assert float((repeated - alone).abs().max()) > 0.02 * float(alone.abs().max())


@pytest.mark.skipif("native" not in BACKENDS, reason="there are no kernels")
@pytest.mark.parametrize("cache", CACHES)
def test_a_saved_sequence_goes_on_in_the_other_backend(cache: str, kind: Any) -> None:
    other = {TorchBackend: NativeBackend, NativeBackend: TorchBackend}[kind](model_with(cache, False))
    backend = backend_on(cache, False)
    slot = backend.open()
    backend.forward([slot], [IDS[:21]])
    state = backend.save(slot)
    expected = backend.forward([slot], [IDS[21:]])
    close(other.forward([other.load(state)], [IDS[21:]]), expected)
