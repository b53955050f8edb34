"""Relative output error of each packed linear against the original's, on the original model's inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.arch import find_arch
from subnibble.calibrate.stats import Gram
from subnibble.model.transformers_api.generation import logits_of
from subnibble.model.transformers_api.names import never_called
from subnibble.resume.interrupt import safe_point
from subnibble.rounding.error import relative_errors
from subnibble.runtime.modules import PackedLinear


def layer_errors(
    model: Any, reference: Any, windows: Tensor, leave_out: Collection[str] = frozenset()
) -> dict[str, float]:
    """Path -> ||(W - Q) X||² / ||W X||², with X the inputs of that linear in the reference on `windows`.

    Holds one Gram matrix, (inputs, inputs) float32, for each site of each block.

    model: the packed transformers model.
    reference: the original, dense transformers model.
    windows: (count, length) int64 token ids.
    leave_out: paths of linears that are stored in another basis and cannot be compared.
    """
    arch = find_arch(reference.config.model_type)
    readers = {
        f"{arch.block_path(index)}.{reader}": f"{arch.block_path(index)}.{site.readers[0]}"
        for index in range(reference.config.num_hidden_layers)
        for site in arch.sites
        for reader in site.readers
    }
    packed = {path: model.get_submodule(path) for path in readers if path not in leave_out}
    packed = {path: module for path, module in packed.items() if isinstance(module, PackedLinear)}
    grams = _input_grams(reference, {readers[path] for path in packed}, windows)
    errors = {}
    for path, module in packed.items():
        safe_point()
        weight = reference.get_submodule(path).weight.detach().float()
        quantized = module.dequantize().to(weight.device)
        (error,) = relative_errors(weight, quantized, grams[readers[path]].value, [weight.shape[0]])
        assert error.output is not None
        errors[path] = error.output
    return errors


def _input_grams(reference: Any, paths: set[str], windows: Tensor) -> dict[str, Gram]:
    device = next(reference.parameters()).device
    linears = {path: reference.get_submodule(path) for path in paths}
    grams = {path: Gram(linear.in_features, device) for path, linear in linears.items()}
    handles = [linear.register_forward_pre_hook(_feed(grams[path])) for path, linear in linears.items()]
    try:
        with torch.inference_mode():
            for window in windows:
                safe_point()
                logits_of(reference, window.unsqueeze(0).to(device))
    finally:
        for handle in handles:
            handle.remove()
    for path, gram in grams.items():
        if not gram.tokens:
            raise never_called(path)
    return grams


def _feed(gram: Gram) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.update(args[0].flatten(0, -2))

    return hook
