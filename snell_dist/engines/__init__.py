"""Engines: who runs forward, backward and the optimizer step. One file an engine, found by its name.

Engines know neither methods nor backbones: they get a model whose trainable parameters require gradients. Where
parameters are sharded, what an engine hands out is whole: `gradients` and `weights` gather, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from snell_dist.config import Section
from snell_dist.footprint import Footprint, Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from snell_dist.data import Batch
    from snell_dist.optim import Optim
    from snell_dist.precision import Precision

    Fill = Callable[[Iterable[nn.Module], torch.device], None]
    MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Work:
    """What an engine is given: a model whose frozen parameters need no gradient, and how to train it."""

    model: nn.Module
    fill: Fill  # brings modules' own tensors to a device; before it they may be on the meta device
    blocks: Mapping[str, nn.Module]  # by name, in order: the unit of sharding
    remembered: list[str]  # buffers that a resumed run needs besides what trains
    make_optimizer: MakeOptimizer
    optim: Optim
    precision: Precision
    device: torch.device
    micro_batch_size: int
    accumulation: int  # micro-batches of a step
    skip_nonfinite: bool  # a step whose gradient norm is not finite leaves the weights as they are


@dataclass(frozen=True)
class Unit:
    """A part of the model that an engine holds together. `gathered_bytes` exist only while it computes."""

    name: str
    trains: int  # numbers, over all ranks
    frozen: int
    dtypes: tuple[str, ...]
    held_bytes: int  # of its parameters, on this rank
    gathered_bytes: int


class Saved(Protocol):
    """A training checkpoint, whatever engine wrote it."""

    def specs(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor in it, keyed as `Engine.state`."""
        ...

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fills these tensors, plain or sharded, in place."""
        ...


class Engine(Protocol):
    """What the loop needs. Tensors of `state` are keyed `model/<name>` and `optimizer/<name>/<state>`."""

    model: nn.Module  # the model itself, with the backbone's parameter names
    device: torch.device

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The micro-batches of one step, on the device; gradients are reduced with the last one."""
        ...

    def forward(self, *inputs: Any) -> Any:
        """The model's outputs, float32 or wider: images [B, C, H, W] to logits [B, classes], for a classifier."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> Tensor:
        """Clips, steps the optimizer at this learning rate, forgets the gradients. Returns the norm before clipping."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Whole gradients of what trains, not clipped, between backward and step. All ranks take part to the end."""
        ...

    def weights(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors of what trains and is remembered, or of those named. All ranks take part to the end."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes up whole tensors that `weights` gave, or some of them; the optimizer's state stays."""
        ...

    def state(self) -> dict[str, Tensor]:
        """This rank's part of what a resumed run needs besides the step, sharded or whole."""
        ...

    def load_state(self, saved: Saved) -> None:
        """Takes up what any engine saved, on any number of ranks. UserError where it does not fit."""
        ...

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each frozen parameter."""
        ...

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's tensors that stay between steps: parameters, buffers, optimizer state.

        Each with the parameter or buffer that it is, or belongs to; an empty name where it is of several.
        """
        ...

    def units(self) -> list[Unit]: ...


def rest(work: Work) -> list[nn.Module]:
    """The modules that are in none of the blocks."""
    inside = {id(module) for block in work.blocks.values() for module in block.modules()}
    return [module for module in work.model.modules() if id(module) not in inside]


@dataclass(frozen=True)
class Job:
    """What an engine's share of the memory depends on, besides one process's footprint."""

    weights: Sequence[Weight]  # of the whole model, in the model's order
    blocks: Sequence[str]  # the unit of sharding, in the order of forward
    ranks: int
    per_node: int  # ranks of one node, which are neighbours
    micro_batches: int  # of a step
    device_type: str  # cuda, cpu


@dataclass(frozen=True)
class Share:
    """What one rank needs: of all ranks the one that holds most, which is the first where parts are unequal."""

    footprint: Footprint  # the same time line, with what the engine holds, gathers and sends in it
    wire_bytes: int  # that the rank sends in a step, by rings
    between_nodes_bytes: int  # of these, by rings that leave the node: what its last rank sends over the network
    host_bytes: int  # of its host's memory, where the engine keeps something there and not on the device
    messages: int  # collectives of a step


class EngineSection(Section):
    """What every engine says."""

    name: str

    @property
    def shards(self) -> bool:
        """Whether a rank never holds the whole model, so that it need not begin with one."""
        return False

    def __str__(self) -> str:
        """`fsdp frozen=replicate`: the name, and what is not usual."""
        said = self.model_dump(exclude_defaults=True, exclude={"name"})
        return " ".join([self.name, *(f"{key}={value}" for key, value in said.items())])

    @classmethod
    def variants(cls, ranks: int, nodes: int) -> list[Self]:
        """Settings that a plan weighs against each other on so many ranks."""
        raise NotImplementedError

    def check(self, precision: Precision, optim: Optim) -> None:
        """ConfigError where the engine does not go with these."""

    def prepare(self, work: Work) -> Engine:
        """ConfigError where the engine cannot do this work, or where its library is missing."""
        raise NotImplementedError

    def share(self, whole: Footprint, job: Job) -> Share:
        """One rank's share of a job. whole: of one process that has all of the model and a rank's micro-batch."""
        raise NotImplementedError
