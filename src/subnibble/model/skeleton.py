"""A transformers model without weights, filled and emptied one module at a time from a checkpoint."""

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
    """A decoder block with its weights loaded. path: its module path in the model."""

    index: int
    path: str
    module: nn.Module
    arch: Arch
    heads: Heads

    def linear(self, name: str) -> nn.Linear:
        """A linear by its name relative to the block."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear), f"{self.path}.{name} is {type(module).__name__}"
        return module

    def gain(self, norm: str) -> Tensor:
        """The gain vector of a norm of the block."""
        weight = self.module.get_submodule(norm).weight
        assert isinstance(weight, Tensor)
        return weight

    def twin(self, dtype: torch.dtype | None = None) -> Block:
        """A copy that stays as it is, in another type if one is given."""
        # Cast one by one: a copy of the whole block in its own type would be the largest thing in memory.
        own = {
            id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), parameter.requires_grad)
            for parameter in self.module.parameters()
        }
        module = copy.deepcopy(self.module, own)
        return replace(self, module=module if dtype is None else module.to(dtype))


class Skeleton:
    """The model's modules on the meta device, filled from `source` on request.

    dtype, device: what loaded weights are cast and moved to.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.config = copy.deepcopy(source.config)
        self.arch = find_arch(self.config.model_type)
        try:
            self.model = empty_causal_lm(self.config, dtype)
        except UnsupportedTransformers:
            raise
        # A config that is well-formed but impossible fails wherever the modules first notice.
        except Exception as error:
            raise CheckpointError(
                f"{source.path}: no model can be built of its config ({type(error).__name__}: {error})"
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
        """Name -> shape of every weight the checkpoint must hold; a tied head is not among them."""
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
        """The site that the linear at `path` reads."""
        name = path.removeprefix(f"{self.arch.blocks}.").partition(".")[2]
        return self.arch.site_of(name)

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        """Fill the module at `path` in `dtype` and give it."""
        module: nn.Module = self.model.get_submodule(path)
        for name, _ in list(module.named_parameters()):
            tensor = self.source.load(f"{path}.{name}").to(self.device, dtype)
            _set_parameter(module, name, tensor)
        return module

    def load_all(self) -> Any:
        """Fill the whole model and give it, ready to run."""
        for name in self.parameter_shapes():
            _set_parameter(self.model, name, self.source.load(name).to(self.device, self.dtype))
        self.model.tie_weights()
        return self.model

    def load_block(self, index: int) -> Block:
        """Fill a decoder block in float32, for edits and rounding, and give it."""
        path = self.arch.block_path(index)
        return Block(index, path, self.load(path, torch.float32), self.arch, Heads.of(self.config))

    def check_tied_head(self) -> None:
        """Raise `CheckpointError` if the config ties the head to the embedding and the file holds another head."""
        head, embedding = f"{self.arch.head}.weight", f"{self.arch.embedding}.weight"
        if not self.tied or head not in self.source.names():
            return
        if not torch.equal(self.source.load(head), self.source.load(embedding)):
            raise CheckpointError(
                f"{self.source.path}: config.json ties {head} to {embedding}, but the file holds different ones; "
                'set "tie_word_embeddings": false in config.json'
            )

    def release(self, path: str) -> None:
        """Drop the weights of the module at `path`."""
        module = self.model.get_submodule(path)
        for name, parameter in list(module.named_parameters()):
            _set_parameter(module, name, torch.empty_like(parameter, device="meta", dtype=self.dtype))

    def block_calls(self, window: int, dtype: torch.dtype | None = None, past: int = 0) -> list[BlockCall]:
        """What the model calls each block with, for a batch of full windows of this length; without a cache.

        dtype: of the hidden states, None for the skeleton's. past: tokens before the windows, whose keys and values the
        block's attention will have.
        """
        decoder, _, blocks = self.arch.blocks.rpartition(".")
        norm = self.arch.final_norm.rpartition(".")[2]
        hidden = torch.zeros(1, window, self.config.hidden_size, dtype=dtype or self.dtype, device=self.device)
        return record_block_calls(self.model.get_submodule(decoder), blocks, norm, hidden, past)

    def _blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _check(self) -> None:
        check_fit(self.source, self.parameter_shapes(), self.arch)


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
