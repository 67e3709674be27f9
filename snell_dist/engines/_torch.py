"""What torch's engines share: parameters that keep their names, sharded (DTensor) or not, and a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from snell_dist import dist, heartbeat
from snell_dist.config import UserError
from snell_dist.engines import Saved, Unit, Work

if TYPE_CHECKING:
    from snell_dist.data import Batch

ON_THE_CPU = "step"  # AdamW's count, wherever its parameter is


class TorchEngine:
    """See `Engine` for the contract.

    run: what is called for a forward, the model itself or its wrapper. reduce: called before each micro-batch with
    whether its gradients are reduced over ranks. loose: parameters whose gradients the wrapper leaves alone.
    groups: the parameters of each unit, by its name.
    """

    def __init__(
        self,
        work: Work,
        run: nn.Module,
        reduce: Callable[[bool], None] = lambda last: None,
        loose: Sequence[nn.Parameter] = (),
        groups: Mapping[str, list[nn.Parameter]] | None = None,
    ) -> None:
        self.model, self.device = work.model, work.device
        self._run, self._reduce, self._loose, self._last = run, reduce, loose, True
        self._groups = {"model": list(self.model.parameters())} if groups is None else groups
        self._precision, self._skips = work.precision, work.skip_nonfinite
        self._clip_norm = work.optim.clip_norm or float("inf")
        self._named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._remembered = {name: self.model.get_buffer(name) for name in work.remembered}
        self._optimizer = work.make_optimizer(self._named.items())

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._last = batch.last
            self._reduce(batch.last)
            yield batch.to(self.device)

    def forward(self, *inputs: Any) -> Any:
        from torch.utils._pytree import tree_map_only

        exact = self._precision.compute == "float64"
        if exact:
            inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        with self._precision.autocast(self.device):
            outputs = self._run(*inputs)
        return tree_map_only(Tensor, Tensor.double if exact else Tensor.float, outputs)

    def backward(self, loss: Tensor) -> None:
        heartbeat.enter("backward")
        loss.backward()
        if self._last:
            for parameter in self._loose:
                if parameter.grad is not None:
                    dist.sum_over_ranks(parameter.grad).div_(dist.world_size())

    def step(self, lr: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = clip(list(self._named.values()), self._clip_norm)
        if not self._skips or norm.isfinite():  # to look at it is to wait for the device
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in self._named.items():
            yield name, None if parameter.grad is None else whole(parameter.grad)

    def weights(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._kept().items():
            if only is None or name in only:
                yield name, whole(tensor.detach())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        mine = self._kept()
        for name, tensor in weights.items():
            part(mine[name]).copy_(part(like(tensor, mine[name])))

    def state(self) -> dict[str, Tensor]:
        state = {f"model/{name}": tensor.detach() for name, tensor in self._kept().items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                if value is not None:  # SGD before its first step
                    state[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        return state

    def load_state(self, saved: Saved) -> None:
        into = {f"model/{name}": tensor.detach() for name, tensor in self._kept().items()}
        specs = saved.specs()
        check_model({key: tensor.shape for key, tensor in into.items()}, specs)
        for name, parameter in self._named.items():
            state: dict[str, Tensor] = {}
            for key, (shape, dtype) in of_optimizer(specs, name):
                if key == ON_THE_CPU:
                    state[key] = torch.zeros(shape, dtype=dtype)
                elif shape == tuple(parameter.shape):
                    state[key] = torch.zeros_like(parameter, dtype=dtype)
                else:
                    state[key] = torch.zeros(shape, dtype=dtype, device=self.device)
                into[f"optimizer/{name}/{key}"] = state[key]
            self._optimizer.state[parameter] = state
        saved.read(into)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                yield name, part(parameter.detach())

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            yield name, part(tensor)
        for name, parameter in self._named.items():
            for value in self._optimizer.state[parameter].values():
                if isinstance(value, Tensor):
                    yield name, part(value)

    def one_by_one(self) -> None:
        """Has the optimizer take plain and sharded parameters each by itself."""
        for group in self._optimizer.param_groups:
            group["foreach"] = False

    def units(self) -> list[Unit]:
        return [unit(name, parameters) for name, parameters in self._groups.items()]

    def _kept(self) -> dict[str, Tensor]:
        return {**self._named, **self._remembered}


def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients down to a norm of `limit` over all ranks, in place. Returns the norm before [].

    Sharded and replicated gradients may stand side by side.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [nn.utils.get_total_norm(kind) for kind in sides(gradients) if kind]
    norm = torch.stack([whole(each) for each in norms]).norm() if len(norms) > 1 else whole(norms[0])
    for kind in sides(parameters):
        if kind:
            nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


def sides(tensors: list[Any]) -> tuple[list[Any], list[Any]]:
    """The plain ones and the sharded ones, which no operation of torch takes together."""
    return [t for t in tensors if not isinstance(t, DTensor)], [t for t in tensors if isinstance(t, DTensor)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, which every rank has, sharded as `model` is; nothing goes over the wire."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def unit(name: str, parameters: Sequence[nn.Parameter]) -> Unit:
    return Unit(
        name,
        trains=sum(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        held_bytes=sum(part(p).nbytes for p in parameters),
        gathered_bytes=sum(p.numel() * p.element_size() for p in parameters if isinstance(p, DTensor)),
    )


def check_model(mine: Mapping[str, Sequence[int]], theirs: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
    """UserError where a checkpoint has not just the tensors that this run trains, by key and shape."""
    wanted, there = set(mine), {key for key in theirs if key.startswith("model/")}
    odd = sorted(wanted ^ there)
    if odd:
        where = "this run has and the checkpoint lacks" if odd[0] in wanted else "the checkpoint has and this run lacks"
        first = odd[0].removeprefix("model/")
        raise UserError(
            f"checkpoint: {len(there)} tensors, this configuration {len(wanted)}; {where} {first}: another run's?"
        )
    for key, shape in mine.items():
        if tuple(shape) != theirs[key][0]:
            name, said = key.removeprefix("model/"), f"{list(theirs[key][0])} there, {list(shape)} here"
            raise UserError(f"checkpoint: {name} is {said}: another rank, or another model's?")


def of_optimizer(specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]], name: str) -> Iterator[tuple[str, Any]]:
    """The optimizer's states of one parameter that a checkpoint has."""
    prefix = f"optimizer/{name}/"
    for key, spec in specs.items():
        if key.startswith(prefix):
            yield key.removeprefix(prefix), spec
