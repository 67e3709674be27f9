"""DeepSpeed's ZeRO (Rajbhandari et al., 2020): what is divided among ranks instead of copied.

stage 0   nothing (plain data parallelism)
stage 1   the optimizer's state      2   gradients, too      3   parameters, too, the frozen base among them

Of a frozen base only stage 3 has anything to divide: with few trained parameters stages 1 and 2 save little.
DeepSpeed's JSON is derived from ours and logged; the optimizer, its schedule and clipping stay those of `optim`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from snell_dist import dist, heartbeat, limits, log, meeting
from snell_dist.config import ConfigError, Problem, first_line
from snell_dist.engines import Engine, EngineSection, Job, Saved, Share, Unit, Work, rest
from snell_dist.engines._deepspeed_keys import check_extra
from snell_dist.engines._shares import (
    BACKWARD,
    Visit,
    Wire,
    along,
    at_the_end,
    by_group,
    ended_backward,
    states,
    step_temporaries,
    units,
)
from snell_dist.footprint import Bytes, Category, Footprint, Phase, Weight, total

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from snell_dist.data import Batch
    from snell_dist.optim import Optim
    from snell_dist.precision import Precision

EXTRA = "snell_dist[deepspeed]"
BROKEN = "0.19.2"  # up to this one, ZeRO-3 fails on frozen parameters in a recomputed block
LEAST_IN_BUCKET, MOST_IN_BUCKET = 1 << 20, 50_000_000  # elements; smaller messages cost latency, not bytes
ALIGNED = 1024  # elements of a bucket are a multiple of it
BUCKETS = 4  # so many at least, that are reduced while backward goes on
# DeepSpeed's own would gather 5e7 numbers ahead and keep what the next 1e9 use again: twice all of a ViT-H.
LAYER_BY_LAYER = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
PERSISTENT = 100_000  # DeepSpeed's own: parameters of so many numbers stay whole on every rank
MOST_LIVE = 4_000_000_000  # bytes of 1e9 numbers, which DeepSpeed gathers at most
MOST_TOGETHER = 500_000_000  # numbers that stage 0 reduces at once


class Zero(EngineSection):
    name: Literal["zero"]
    stage: Literal[0, 1, 2, 3] = Field(2, description="what is divided: nothing, optimizer, gradients, parameters")
    frozen: Literal["replicate", "shard", "offload"] | None = Field(
        None, description="where the frozen base is; null: as the stage has it (3: shard or offload, else replicate)"
    )
    offload_optimizer: bool = Field(False, description="keep the optimizer's state in host memory and step there")
    nvme_path: str | None = Field(None, description="a folder on a fast disk to offload to, instead of host memory")
    deepspeed_extra: dict[str, Any] = Field({}, description="more keys of DeepSpeed's JSON, passed on as they are")

    @property
    def shards(self) -> bool:
        return self.stage == 3

    @model_validator(mode="after")
    def _fits(self) -> Zero:
        allowed = ("shard", "offload") if self.stage == 3 else ("replicate",)
        if self.frozen not in (None, *allowed):
            raise ValueError(f"frozen: {self.frozen}: stage {self.stage} allows {' or '.join(allowed)}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        if self.nvme_path and not (self.offload_optimizer or self.frozen == "offload"):
            raise ValueError("nvme_path needs offload_optimizer: true or frozen: offload")
        return self

    def __str__(self) -> str:
        said = self.model_dump(exclude_defaults=True, exclude={"name", "stage"})
        return " ".join([f"zero stage={self.stage}", *(f"{key}={value}" for key, value in said.items())])

    @classmethod
    def variants(cls, ranks: int, nodes: int) -> list[Zero]:
        whole = [cls(name="zero", stage=1), cls(name="zero", stage=2)] if ranks > 1 else []
        sharded = [cls(name="zero", stage=3)] if ranks > 1 else []
        return [*whole, *sharded, cls(name="zero", stage=3, frozen="offload", offload_optimizer=True)]

    def check(self, precision: Precision, optim: Optim) -> None:
        if precision.compute == "float64":
            raise ConfigError(Problem("precision.compute", "DeepSpeed reduces no float64: use ddp or fsdp", "float64"))
        if self.stage == 3 and precision.frozen in ("int8", "nf4"):
            message = "cannot be sharded: use engine.stage 0, 1 or 2, or float32 or bfloat16 here"
            raise ConfigError(Problem("precision.frozen", message, precision.frozen))
        if self.stage > 0 and optim.name == "adamw8bit":
            message = "cannot be divided among ranks: use adamw, or engine.stage=0"
            raise ConfigError(Problem("optim.name", message, optim.name))
        if self.stage == 3 and optim.ema_decay:
            message = "no moving average of what ZeRO-3 divides: use engine.name=fsdp, or engine.stage 0, 1 or 2"
            raise ConfigError(Problem("optim.ema_decay", message, optim.ema_decay))

    def prepare(self, work: Work) -> Engine:
        if work.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed decides by it when it is imported
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that DeepSpeed has to change
        try:
            import deepspeed
        except ImportError:
            message = f"needs DeepSpeed: pip install '{EXTRA}'"
            raise ConfigError(Problem("engine.name", message, self.name)) from None
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._check(work, deepspeed.__version__)
        meeting.ensure_group(work.device)
        _be_launched()
        # Sums of inference on CPUs, which nothing here calls: not to be compiled, silently and for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # What NVMe needs is compiled with ninja, and anew where another version of it did: that of our environment,
        # which need not be activated, goes before the system's.
        if shutil.which("ninja", path=(scripts := sysconfig.get_path("scripts"))):
            os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
        with redirect_stdout(io.StringIO()):  # it prints what it built
            deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
        meeting.at_end(deepspeed.comm.destroy_process_group)  # a later run in this process has other groups
        config = self.derived(work)
        check_extra(self.deepspeed_extra, config)
        log.info(f"DeepSpeed {deepspeed.__version__}: {json.dumps(config)}")
        if self.stage == 3:
            for module, own in (*((b, list(b.modules())) for b in work.blocks.values()), (work.model, rest(work))):
                work.fill(own, work.device)
                with _vectors(p for p in module.parameters() if p.ndim == 0):
                    deepspeed.zero.Init(module=module, config_dict_or_path=config)
        optimizer = work.make_optimizer((n, p) for n, p in work.model.named_parameters() if p.requires_grad)
        for scalar in (p for p in work.model.parameters() if p.ndim == 0):
            scalar.ds_optim_param = True  # type: ignore[attr-defined]  # is not broadcast; see _vectors
        try:
            engine, *_ = deepspeed.initialize(model=work.model, optimizer=optimizer, config=config)
        except (AssertionError, ValueError, RuntimeError) as error:
            if limits.ran_out(error):
                raise
            raise ConfigError(Problem("engine", f"DeepSpeed refuses: {first_line(error)}")) from None
        return ZeroEngine(work, engine, optimizer, self.stage)

    def derived(self, work: Work) -> dict[str, Any]:
        """DeepSpeed's configuration of this work."""
        bucket = bucket_numbers([p.numel() for p in work.model.parameters() if p.requires_grad])
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.stage == 3:
            # DeepSpeed would put a product of its own in place of torch's, which rounds differently.
            zero["memory_efficient_linear"] = False
            zero |= LAYER_BY_LAYER
        place = {"device": "nvme", "nvme_path": self.nvme_path} if self.nvme_path else {"device": "cpu"}
        if work.device.type == "cuda":
            place["pin_memory"] = True  # type: ignore[assignment]
        if self.offload_optimizer:
            zero["offload_optimizer"] = place
        if self.frozen == "offload":
            zero["offload_param"] = place
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": work.micro_batch_size,
            "gradient_accumulation_steps": work.accumulation,
            "gradient_clipping": work.optim.clip_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the optimizer stays torch's, offloaded or not
            "steps_per_print": 2**31,
            "zero_optimization": zero,
        }
        if work.precision.compute == "bfloat16":
            # No module counts as safe for half-precision gradients: those of what trains stay float32.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        extra = dict(self.deepspeed_extra)
        config["zero_optimization"] = zero | extra.pop("zero_optimization", {})
        return config | extra

    def share(self, whole: Footprint, job: Job) -> Share:
        """As DeepSpeed 0.19 has it with the configuration that is `derived`."""
        return (self._share0, self._share12, self._share12, self._share3)[self.stage](whole, job)

    def _share0(self, whole: Footprint, job: Job) -> Share:
        """All gradients are copied into one flat tensor, which is reduced after the last backward."""
        trains, wire = total(job.weights, trains=True), Wire(job)
        together = min(trains, 4 * MOST_TOGETHER)
        wire.all_reduce(trains, job.ranks, times=1)

        def change(visit: Visit) -> Bytes:
            return {Category.COMMUNICATION: together} if at_the_end(visit) else {}

        return wire.share(along(ended_backward(whole), job, change, {}))

    def _share12(self, whole: Footprint, job: Job) -> Share:
        """What trains lies in flat tensors, of which a rank has its part once more, to step it.

        A bucket is there while backward runs, and what is in it is copied to be reduced. The gradients of parameters
        that are in a rank's part, or reach into it, are then kept whole. In stage 1 that comes after the last backward.
        """
        flat = _Flat.of(job)
        away = self.offload_optimizer and job.device_type != "cpu"  # else the device is the host
        stepped = states(whole, flat.trains, flat.part) + flat.part
        several = job.micro_batches > 1
        hosted = 0  # gradients, what is sent back, a buffer, gradients of earlier micro-batches
        if self.offload_optimizer:
            hosted = 2 * flat.part + flat.largest + (flat.reaching if several else 0)
        held = {
            Category.TRAINABLE: whole.held.get(Category.TRAINABLE, 0) - flat.trains + flat.whole,
            Category.OPTIMIZER: 0 if away else stepped,
            Category.COMMUNICATION: (flat.largest if self.offload_optimizer else 0) + (0 if away else hosted),
        }
        bucket = 4 * self._said("reduce_bucket_size", bucket_numbers(flat.numbers))
        kept = 0 if self.offload_optimizer else flat.reaching

        def change(visit: Visit) -> Bytes:
            moment, gradients = visit.moment, visit.gradients
            sending = held[Category.COMMUNICATION]
            if moment.phase == Phase.STEP:
                mine = 0 if self.offload_optimizer else kept + max(flat.parts)
                temporaries = step_temporaries(visit, job, flat.sizes, [max(flat.parts)])
                return held | {Category.GRADIENTS: mine, Category.TEMPORARY: 0 if away else temporaries}
            if moment.phase not in BACKWARD:
                return held | {Category.GRADIENTS: kept if several and self.stage == 2 and gradients else gradients}
            if self.stage == 1 and not at_the_end(visit):
                return held | {Category.COMMUNICATION: sending + bucket}
            if self.stage == 1:
                left = max(flat.trains - bucket, 0)
                copied = max(min(flat.trains, bucket), kept if left else 0)
                return held | {Category.GRADIENTS: left, Category.COMMUNICATION: sending + bucket + copied}
            begun = gradients > bucket or not visit.first
            return held | {
                Category.GRADIENTS: kept if begun else 0,
                Category.COMMUNICATION: sending + bucket + (min(flat.trains, bucket) if _reduced(visit, bucket) else 0),
            }

        wire = Wire(job)
        wire.all_reduce(flat.trains, job.ranks, times=job.micro_batches if self.stage == 2 else 1)
        for size in flat.wholes:
            wire.gather(size, job.ranks)
        host = stepped + hosted if away else 0
        return wire.share(along(ended_backward(whole), job, change, held), host)

    def _share3(self, whole: Footprint, job: Job) -> Share:
        """A layer's parameters are gathered when it runs; in recomputation a block's stay until its backward is over.

        The bucket and a rank's part of the gradient are there for good, and so are small parameters, but for the step.
        """
        ranks, parts = job.ranks, units(job)
        persistent = self._said("stage3_param_persistence_threshold", PERSISTENT)
        trained = [w for w in job.weights if w.trains]
        frozen = sum(_part3(w, ranks) for w in job.weights if not w.trains)
        trains = sum(_part3(w, ranks) for w in trained)
        small = total(w for w in job.weights if w.numbers <= persistent)
        groups = by_group(trained)
        flat = [sum(_part3(w, ranks) for w in group) for group in groups]
        whole_trains, stepped = total(trained), states(whole, total(trained), trains) + trains
        bucket = 4 * self._said("reduce_bucket_size", bucket_numbers([w.numbers for w in trained]))
        on_cpu = job.device_type == "cpu"  # then the device is the host
        weights_away, steps_away = self.frozen == "offload" and not on_cpu, self.offload_optimizer and not on_cpu
        more = trains if self.offload_optimizer else 0  # the gradient that the optimizer is given
        held = {
            Category.FROZEN: whole.held.get(Category.FROZEN, 0)
            - total(job.weights, trains=False)
            + (0 if weights_away else frozen),
            Category.TRAINABLE: 0 if weights_away else trains,
            Category.OPTIMIZER: 0 if steps_away else stepped,
            Category.GRADIENTS: 0 if steps_away else trains + more,
            Category.GATHERED: small,
            Category.COMMUNICATION: bucket,
        }
        layers = {name: _layers(own, persistent) for name, own in parts.items()}
        recomputed = {m.block for m in whole.moments if m.phase == Phase.RECOMPUTE}
        ahead = 4 * self._said("stage3_prefetch_bucket_size", 0)
        large = total(job.weights) - small

        def change(visit: Visit) -> Bytes:
            moment = visit.moment
            if moment.phase == Phase.STEP:
                temporaries = step_temporaries(visit, job, [w.bytes for group in groups for w in group], [max(flat)])
                return held | {
                    Category.GATHERED: 0,
                    Category.GRADIENTS: held[Category.GRADIENTS] + (0 if self.offload_optimizer else max(flat)),
                    Category.TEMPORARY: 0 if steps_away else temporaries,
                }
            here = layers[visit.unit]
            running = max((_gathered(layer) for layer in here), default=0)
            if moment.phase in BACKWARD and visit.unit in recomputed:
                running = total(w for layer in here for w in layer)
            if ahead:
                running = min(large, MOST_LIVE) + min(large, ahead)
            reduced = ranks > 1 and moment.phase in BACKWARD and _reduced(visit, bucket)
            return held | {
                Category.GATHERED: small + (0 if at_the_end(visit) else running),
                Category.COMMUNICATION: bucket + (min(whole_trains, bucket) if reduced else 0),
            }

        wire = Wire(job)
        for weight in job.weights:
            if weight.numbers <= persistent:
                wire.gather(weight.bytes, ranks)
        for name, here in layers.items():
            passes = 1 + (name in {m.block for m in whole.moments if m.phase in BACKWARD}) + (name in recomputed)
            for layer in here:
                wire.gather(total(layer), ranks, times=job.micro_batches * passes)
        wire.gather(whole_trains, ranks, times=job.micro_batches)
        host = (frozen + trains if weights_away else 0) + (stepped + trains + more if steps_away else 0)
        return wire.share(along(ended_backward(whole), job, change, held), host)

    def _said(self, key: str, ours: int) -> int:
        """What the user's DeepSpeed keys say, or we."""
        return int(self.deepspeed_extra.get("zero_optimization", {}).get(key, ours))

    def _check(self, work: Work, version: str) -> None:
        from packaging.version import Version

        if self.stage == 3 and Version(version) <= Version(BROKEN):
            message = (
                f"DeepSpeed {version} fails on frozen parameters in recomputed blocks (allowed: above {BROKEN});"
                f" pip install --upgrade '{EXTRA}'"
            )
            raise ConfigError(Problem("engine.stage", message, self.stage))
        self.check(work.precision, work.optim)


def bucket_numbers(trains: list[int]) -> int:
    """The size of a bucket, for tensors of so many numbers that train."""
    bucket = max(min(sum(trains) // BUCKETS, MOST_IN_BUCKET), LEAST_IN_BUCKET, *trains)
    return -(-bucket // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class _Flat:
    """What trains under stages 1 and 2: a flat tensor for each of the optimizer's groups. Bytes, but for `numbers`."""

    numbers: list[int]  # of each tensor
    sizes: list[int]
    wholes: list[int]  # of each group, padded
    parts: list[int]  # of these, a rank's
    reaching: int  # of the tensors that are in a rank's parts or reach into them, of the rank that has most

    @classmethod
    def of(cls, job: Job) -> _Flat:
        groups = by_group([w for w in job.weights if w.trains])
        aligned = 2 * job.ranks
        wholes = [-(-sum(w.numbers for w in group) // aligned) * aligned for group in groups]
        reaching = [0] * job.ranks
        for group, size in zip(groups, wholes, strict=True):
            begin, part = 0, size // job.ranks
            for weight in group:
                for rank in range(begin // part, (begin + weight.numbers - 1) // part + 1):
                    reaching[rank] += weight.bytes
                begin += weight.numbers
        trained = [w for group in groups for w in group]
        item = [group[0].bytes // group[0].numbers for group in groups]
        return cls(
            [w.numbers for w in trained],
            [w.bytes for w in trained],
            [size * i for size, i in zip(wholes, item, strict=True)],
            [size * i // job.ranks for size, i in zip(wholes, item, strict=True)],
            max(reaching),
        )

    @property
    def trains(self) -> int:
        return sum(self.sizes)

    @property
    def whole(self) -> int:
        return sum(self.wholes)

    @property
    def part(self) -> int:
        return sum(self.parts)

    @property
    def largest(self) -> int:
        return max(self.sizes)


def _part3(weight: Weight, ranks: int) -> int:
    """Bytes of a rank's part of a parameter under stage 3, the last one padded."""
    return -(-weight.numbers // ranks) * (weight.bytes // weight.numbers)


def _reduced(visit: Visit, bucket: int) -> bool:
    """Whether a bucket of so many bytes is reduced in a visit of backward: when it is full, and at the end.

    How far a later micro-batch's gradients have come cannot be seen: where they fill buckets, it may be in any visit.
    """
    full = visit.gradients // bucket > (visit.gradients_before // bucket if visit.first else 0)
    return at_the_end(visit) or full


def _layers(weights: list[Weight], persistent: int) -> list[list[Weight]]:
    """The parameters that one module gathers for itself, for each module that has some."""
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.numbers > persistent:
            found.setdefault(weight.name.rpartition(".")[0], []).append(weight)
    return list(found.values())


def _gathered(layer: list[Weight]) -> int:
    """While it runs: several parameters come in one buffer and are copied out of it."""
    return total(layer) * (1 if len(layer) == 1 else 2)


def _be_launched() -> None:
    """DeepSpeed asks for LOCAL_RANK where no launcher ran, too, even in a step; what comes after the run would take it
    for a launcher's.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        meeting.at_end(_be_alone)


def _be_alone() -> None:
    os.environ.pop("LOCAL_RANK", None)


class ZeroEngine:
    """See `Engine` for the contract. What DeepSpeed divides is handed out whole, one tensor at a time."""

    def __init__(self, work: Work, engine: Any, optimizer: torch.optim.Optimizer, stage: int) -> None:
        self.model, self.device = work.model, work.device
        self._engine, self._inner, self._stage = engine, optimizer, stage
        self._blocks, self._skips = work.blocks, work.skip_nonfinite
        self._named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._remembered = {name: self.model.get_buffer(name) for name in work.remembered}

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._engine.set_gradient_accumulation_boundary(batch.last)
            yield batch.to(self.device)

    def forward(self, *inputs: Any) -> Any:
        import torch
        from torch.utils._pytree import tree_map_only

        if self._stage < 3 or not torch.is_grad_enabled():
            outputs = self._engine(*inputs)
        else:
            with torch.autograd.graph.saved_tensors_hooks(_without_gathered, _gathered_again):
                outputs = self._engine(*inputs)
        return tree_map_only(torch.Tensor, torch.Tensor.float, outputs)

    def backward(self, loss: Tensor) -> None:
        heartbeat.enter("backward")
        self._engine.backward(loss, scale_wrt_gas=False)  # the loss is the mean over the whole batch already

    def step(self, lr: float) -> Tensor:
        import torch

        for group in self._inner.param_groups:
            group["lr"] = lr
        if self._stage:  # skips by itself where the norm is not finite
            self._engine.step()
            return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])
        if self._skips and not norm.isfinite():
            self._inner.zero_grad()
        self._engine.step()
        return norm

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._named.items():
            yield name, safe_get_full_grad(parameter) if self._stage else parameter.grad

    def weights(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (self._named | self._remembered).items():
            if only is None or name in only:
                yield name, self._weight(self._named[name]) if name in self._named else tensor

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            if name in self._remembered:
                self._remembered[name].copy_(tensor)
            else:
                self._set_weight(self._named[name], tensor)

    def state(self) -> dict[str, Tensor]:
        """Every rank takes part in gathering each tensor, and one keeps it, in host memory."""
        state: dict[str, Tensor] = {}
        self._link()
        for i, (name, parameter) in enumerate(self._named.items()):
            own = {f"model/{name}": self._weight(parameter)}
            for key, value in self._optimizer_state(parameter):
                own[f"optimizer/{name}/{key}"] = value
            if i % dist.world_size() == dist.rank():
                state |= {key: value.detach().cpu().clone() for key, value in own.items()}
        if dist.rank() == 0:
            state |= {f"model/{name}": tensor for name, tensor in self._remembered.items()}
        return state

    def load_state(self, saved: Saved) -> None:
        import torch

        from snell_dist.engines._torch import check_model, of_optimizer

        specs = saved.specs()
        mine = {name: getattr(p, "ds_shape", p.shape) for name, p in (self._named | self._remembered).items()}
        check_model({f"model/{name}": shape for name, shape in mine.items()}, specs)
        saved.read({f"model/{name}": tensor for name, tensor in self._remembered.items()})
        states = {name: dict(of_optimizer(specs, name)) for name in self._named}
        self._make_states(saved, states)
        for name, parameter in self._named.items():
            into = {f"optimizer/{name}/{key}": spec for key, spec in states[name].items()}
            tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in into.items()}
            shape, dtype = specs[f"model/{name}"]
            tensors[f"model/{name}"] = torch.empty(shape, dtype=dtype)
            saved.read(tensors)
            self._set_weight(parameter, tensors[f"model/{name}"])
            for key in states[name]:
                self._set_state(parameter, key, tensors[f"optimizer/{name}/{key}"])

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                yield name, getattr(parameter, "ds_tensor", parameter.detach())

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, getattr(parameter, "ds_tensor", parameter)
        yield from self.model.named_buffers()
        states = [value for state in self._inner.state.values() for value in state.values()]
        for tensor in (*(self._flat() if self._stage else ()), *states):
            if hasattr(tensor, "untyped_storage"):
                yield "", tensor  # flat, of all that trains

    def units(self) -> list[Unit]:
        if self._stage < 3:
            return [_unit("model", list(self.model.parameters()))]
        groups = {name: list(block.parameters()) for name, block in self._blocks.items()}
        inside = {id(p) for parameters in groups.values() for p in parameters}
        groups["the rest"] = [p for p in self.model.parameters() if id(p) not in inside]
        return [_unit(name, parameters) for name, parameters in groups.items()]

    # What DeepSpeed's stages do to one parameter.

    def _flat(self) -> list[Tensor]:
        """This rank's flat float32 partitions, which the inner optimizer steps."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter) if self._stage == 3 else parameter.detach()

    def _optimizer_state(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        import torch
        from deepspeed.utils import safe_get_full_optimizer_state

        states = self._inner.state[self._flat()[0] if self._stage else parameter]
        for key, value in states.items():
            if value is None:  # SGD before its first step
                continue
            divided = self._stage and isinstance(value, torch.Tensor) and value.ndim
            yield key, safe_get_full_optimizer_state(parameter, key) if divided else torch.as_tensor(value)

    def _make_states(self, saved: Saved, states: Mapping[str, Mapping[str, Any]]) -> None:
        """DeepSpeed makes the optimizer's state with the first step only; here it is made to be filled."""
        import torch

        if not self._stage:
            return
        name, first = next(iter(states.items()))
        scalars = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in first.items() if key == "step"}
        saved.read({f"optimizer/{name}/{key}": tensor for key, tensor in scalars.items()})
        for flat in self._flat():
            self._inner.state[flat] = {
                key: scalars[key].clone() if key in scalars else torch.zeros_like(flat) for key in first
            }
        self._link()

    def _link(self) -> None:
        """DeepSpeed links parameters with their states after the first group's first step, when others have none."""
        if self._stage in (1, 2) and self._inner.state:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_weight(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        import torch
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with torch.no_grad():
            if self._stage == 3:
                part = _part(parameter, tensor)
                safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]  # what forward gathers
                if parameter.numel():  # one that stays gathered
                    parameter.data.copy_(tensor)
                return
            if self._stage:
                safe_set_full_fp32_param(parameter, tensor.to(self.device))
            parameter.data.copy_(tensor)

    def _set_state(self, parameter: nn.Parameter, key: str, tensor: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self._stage:
            place = "cpu" if key == "step" else self.device
            self._inner.state[parameter][key] = tensor.to(place)
        elif key != "step" and self._stage == 3:
            safe_set_local_optimizer_state(parameter, _part(parameter, tensor), key)
        elif key != "step":
            safe_set_full_optimizer_state(parameter, tensor.to(self.device), key)


@contextmanager
def _vectors(scalars: Iterable[nn.Parameter]) -> Iterator[None]:
    """DeepSpeed broadcasts parameters as bytes, of which a scalar has no view: for that it is a vector of one."""
    import torch

    changed = list(scalars)
    for scalar in changed:
        scalar.data = scalar.data.view(1)
    yield
    for scalar in changed:
        scalar.ds_shape = torch.Size()  # type: ignore[attr-defined]  # the one that it is gathered in


@dataclass(frozen=True)
class _View:
    """What autograd wanted to keep of a divided parameter: x W^T keeps the view W^T, and with it all of W."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # in elements, from the parameter's first


def _without_gathered(tensor: Tensor) -> Tensor | _View:
    base: Any = tensor._base
    if not hasattr(base, "ds_tensor"):
        return tensor
    return _View(base, tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset())


def _gathered_again(kept: Tensor | _View) -> Tensor:
    """DeepSpeed gathers a module's parameters before its backward."""
    if not isinstance(kept, _View):
        return kept
    whole = kept.parameter.detach()
    return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)


def _part(parameter: Any, tensor: Tensor) -> Tensor:
    """This rank's partition of a whole tensor; the last ones are padded."""
    size = parameter.ds_tensor.numel()
    padded = tensor.new_zeros(size * dist.world_size())
    padded[: tensor.numel()] = tensor.flatten()
    return padded[dist.rank() * size :][:size]


def _unit(name: str, parameters: list[Any]) -> Unit:
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in parameters}
    divided = [p for p in parameters if hasattr(p, "ds_tensor")]
    return Unit(
        name,
        trains=sum(sizes[id(p)] for p in parameters if p.requires_grad),
        frozen=sum(sizes[id(p)] for p in parameters if not p.requires_grad),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        held_bytes=sum(getattr(p, "ds_tensor", p).nbytes for p in parameters),
        gathered_bytes=sum(sizes[id(p)] * p.element_size() for p in divided),
    )
