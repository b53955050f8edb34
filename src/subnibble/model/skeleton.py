"""A transformers model on the meta device whose modules are filled from a checkpoint, and released, one at a time."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.arch import find_arch
from subnibble.arch.site import Arch, Heads, Site
from subnibble.checkpoint.fit import check_fit
from subnibble.checkpoint.source import Source
from subnibble.errors import CheckpointError, UnsupportedTransformers
from subnibble.model.transformers_api.blocks import BlockCall, record_block_calls
from subnibble.model.transformers_api.empty import empty_causal_lm


@dataclass(frozen=True)
class Block:
    """A decoder block with its weights loaded.

    index: number of the block.
    path: path of the module in the model.
    module: the block.
    arch: architecture of the model.
    heads: attention heads of the model.
    """

    index: int
    path: str
    module: nn.Module
    arch: Arch
    heads: Heads

    def linear(self, name: str) -> nn.Linear:
        """The linear with this name relative to the block."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear), f"{self.path}.{name} is {type(module).__name__}"
        return module

    def gain(self, norm: str) -> Tensor:
        """The gain of a norm, (channels,). norm: name relative to the block."""
        weight = self.module.get_submodule(norm).weight
        assert isinstance(weight, Tensor)
        return weight

    def copy(self, dtype: torch.dtype | None = None) -> Block:
        """A copy of the block that later edits do not change. dtype: of the copy; None: unchanged."""
        # Cast parameter by parameter: a copy of the whole block in its current dtype would be the peak of memory.
        copies = {
            id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), parameter.requires_grad)
            for parameter in self.module.parameters()
        }
        # Its modules hold the model's config, which copies share.
        configs = (module.__dict__.get("config") for module in self.module.modules())
        module = copy.deepcopy(self.module, copies | {id(config): config for config in configs})
        return replace(self, module=module if dtype is None else module.to(dtype))


class Skeleton:
    """The modules of a model on the meta device, filled from a checkpoint on request.

    source: the checkpoint.
    dtype: dtype of loaded weights; blocks are loaded in float32.
    device: device of loaded weights.
    Raises `UnsupportedModel` or `CheckpointError` if the checkpoint does not fit a supported architecture.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.config = copy.deepcopy(source.config)
        self.arch = find_arch(self.config.model_type)
        try:
            self.model = empty_causal_lm(self.config, dtype)
        except UnsupportedTransformers:
            raise
        # A config with impossible values fails with any error, wherever a module first uses them.
        except Exception as error:
            raise CheckpointError(
                f"{source.path}: no model can be built from its config.json ({type(error).__name__}: {error}); fix it "
                "or fetch it again"
            ) from error
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.tied = bool(self.config.tie_word_embeddings)
        self._check()

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks())

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight that the checkpoint must hold; without a tied head."""
        tied_head = f"{self.arch.head}.weight" if self.tied else None
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: tuple(parameter.shape) for name, parameter in named if name != tied_head}

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Path -> (outputs, inputs) of every linear that gets quantized, in data-flow order."""
        shapes = {}
        for index in range(self.num_blocks):
            path = self.arch.block_path(index)
            for name in self.arch.linears:
                module = self.model.get_submodule(f"{path}.{name}")
                shapes[f"{path}.{name}"] = (int(module.out_features), int(module.in_features))
        return shapes

    def site_of(self, path: str) -> Site:
        """The site that the linear at `path` (in the model) reads."""
        name = path.removeprefix(f"{self.arch.blocks}.").partition(".")[2]
        return self.arch.site_of(name)

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        """Fill the module at `path` with weights in `dtype` and return it."""
        module: nn.Module = self.model.get_submodule(path)
        for name, _ in list(module.named_parameters()):
            tensor = self.source.load(f"{path}.{name}").to(self.device, dtype)
            _set_parameter(module, name, tensor)
        return module

    def load_all(self) -> Any:
        """Fill the whole model and return it, ready to run."""
        for name in self.parameter_shapes():
            _set_parameter(self.model, name, self.source.load(name).to(self.device, self.dtype))
        self.model.tie_weights()
        return self.model

    def load_block(self, index: int) -> Block:
        """Fill a decoder block in float32, for edits and rounding, and return it."""
        path = self.arch.block_path(index)
        return Block(index, path, self.load(path, torch.float32), self.arch, Heads.of(self.config))

    def check_tied_head(self) -> None:
        """Raise `CheckpointError` if the config ties the head to the embedding, but the file holds a different head."""
        head, embedding = f"{self.arch.head}.weight", f"{self.arch.embedding}.weight"
        if not self.tied or head not in self.source.names():
            return
        if not torch.equal(self.source.load(head), self.source.load(embedding)):
            raise CheckpointError(
                f"{self.source.path}: config.json ties {head} to {embedding}, but the two differ in the file; "
                'set "tie_word_embeddings": false in config.json'
            )

    def release(self, path: str) -> None:
        """Move the module at `path` back to the meta device, which frees its weights."""
        module = self.model.get_submodule(path)
        for name, parameter in list(module.named_parameters()):
            _set_parameter(module, name, torch.empty_like(parameter, device="meta", dtype=self.dtype))

    def block_calls(self, window: int, dtype: torch.dtype | None = None, prefix_length: int = 0) -> list[BlockCall]:
        """The arguments that the model gives each block for a batch of full windows, without a KV cache.

        window: tokens of a window.
        dtype: dtype of the hidden states; None: that of the skeleton.
        prefix_length: tokens before each window, whose keys and values the attention will have.
        """
        decoder, _, blocks = self.arch.blocks.rpartition(".")
        norm = self.arch.final_norm.rpartition(".")[2]
        hidden = torch.zeros(1, window, self.config.hidden_size, dtype=dtype or self.dtype, device=self.device)
        return record_block_calls(self.model.get_submodule(decoder), blocks, norm, hidden, prefix_length)

    def _blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _check(self) -> None:
        check_fit(self.source, self.parameter_shapes(), self.arch)


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
