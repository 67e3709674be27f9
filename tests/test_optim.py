"""Rates against torch's and timm's schedulers and the released code's own; optimizers against their libraries."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import saved
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from snell_dist.config import ConfigError, check
from snell_dist.engines import Engine, Work
from snell_dist.engines.ddp import Ddp
from snell_dist.optim import Optim, lr_at, make_optimizer
from snell_dist.precision import Precision

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lr_schedule.json").read_text())
RELEASED: dict[str, Any] = {"schedule": "cosine_epochs", "warmup_lr": 1e-6, "min_lr": 1e-5}
NAMES = ["adamw", "adamw8bit", "sgd"]


def rates(optim: Optim, steps: int, steps_per_epoch: int = 1) -> list[float]:
    return [lr_at(optim, step, steps, steps_per_epoch) for step in range(steps)]


def scheduled(scheduler: Callable[[torch.optim.Optimizer], Any], lr: float, count: int) -> list[float]:
    """What a library's scheduler has in force at each of its steps."""
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    stepper = scheduler(sgd)
    found = []
    for number in range(count):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        stepper.step(number) if isinstance(stepper, CosineLRScheduler) else stepper.step()
    return found


def test_vectors_and_tokens_do_not_decay() -> None:
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    model.fc = nn.Linear(4, 4)
    optimizer = make_optimizer(Optim(weight_decay=0.3), model.named_parameters())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(model.fc.weight): 0.3, id(model.fc.bias): 0.0, id(model.cls_token): 0.0}


def test_the_released_schedule_to_the_last_digit() -> None:
    optim = Optim(lr=GOLDEN["lr"], warmup_epochs=GOLDEN["warmup_epochs"], **RELEASED)
    assert (optim.warmup_lr, optim.min_lr) == (GOLDEN["warmup_lr"], GOLDEN["min_lr"])
    steps_per_epoch = 7
    expected = [rate for rate in GOLDEN["lr_during_epoch"] for _ in range(steps_per_epoch)]
    assert rates(optim, GOLDEN["epochs"] * steps_per_epoch, steps_per_epoch) == expected


@pytest.mark.parametrize("lr", [1e-3, 3e-4, 0.07])
@pytest.mark.parametrize(("epochs", "warmup"), [(100, 10), (200, 10), (37, 5), (8, 0), (6, 10)])
def test_epochs_of_cosine_are_timms(epochs: int, warmup: int, lr: float) -> None:
    def timms(optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
        return CosineLRScheduler(optimizer, epochs, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6)

    optim = Optim(lr=lr, warmup_epochs=warmup, **RELEASED)
    assert rates(optim, epochs) == pytest.approx(scheduled(timms, lr, epochs), rel=1e-15, abs=0)


def test_an_epoch_that_is_cut_short_counts_whole() -> None:
    optim = Optim(warmup_epochs=2, **RELEASED)
    assert rates(optim, 47, 10) == rates(optim, 50, 10)[:47]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_steps_of_cosine_and_line_are_torchs(schedule: str, warmup: int) -> None:
    steps, lr, least = 40, 0.1, 0.01
    optim = Optim(lr=lr, min_lr=least, warmup_steps=warmup, schedule=schedule)
    left = steps - warmup

    def torchs(optimizer: torch.optim.Optimizer) -> Any:
        if schedule == "linear":
            return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, least / lr, left)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, left, least)

    found = rates(optim, steps)
    assert found[warmup:] == pytest.approx(scheduled(torchs, lr, left), rel=1e-9)
    assert found[:warmup] == pytest.approx([lr * (step + 1) / (warmup + 1) for step in range(warmup)])


def test_a_warmup_begins_at_its_own_rate_and_may_be_counted_in_epochs() -> None:
    by_steps = Optim(lr=1.0, warmup_steps=9, warmup_lr=0.5, schedule="constant")
    by_epochs = Optim(lr=1.0, warmup_epochs=3, warmup_lr=0.5, schedule="constant")
    assert rates(by_steps, 20, 3) == rates(by_epochs, 20, 3)
    assert rates(by_steps, 20)[:10] == pytest.approx([0.5 + 0.05 * (step + 1) for step in range(10)])
    assert set(rates(by_steps, 20)[10:]) == {1.0}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"warmup_steps": 3, "warmup_epochs": 1}, "either warmup_steps or warmup_epochs"),
        ({"warmup_steps": 3, "schedule": "cosine_epochs"}, "say warmup_epochs"),
        ({"schedule": "cosine_epoch"}, "did you mean 'cosine_epochs'"),
        ({"name": "adamw8bits"}, "did you mean 'adamw8bit'"),
        ({"nesterov": True}, "needs name: sgd"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "a momentum above 0"),
        ({"ema_decay": 1.0}, "less than 1"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(said: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check(said, Optim)
    assert "\n" not in str(caught.value)


def engine(optim: Optim) -> Engine:
    """A small model of matrices above and below 8-bit AdamW's 4,096 entries, and vectors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 64), nn.GELU(), nn.Linear(64, 5))
    return Ddp(name="ddp").prepare(
        Work(
            model=model, fill=lambda modules, device: None, blocks={}, remembered=[],
            make_optimizer=lambda named: make_optimizer(optim, named), optim=optim, precision=Precision(),
            device=torch.device("cpu"), micro_batch_size=16, accumulation=1, skip_nonfinite=False,
        )
    )  # fmt: skip


def loss(model: nn.Module, step: int) -> Tensor:
    drawn = torch.Generator().manual_seed(step)
    return cross_entropy(model(torch.randn(16, 80, generator=drawn)), torch.randint(5, (16,), generator=drawn))


def steps(made: Engine, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        found = loss(made.model, step)
        made.backward(found)
        made.step(0.01 / (step + 1))
        losses.append(found.item())
    return losses


@pytest.mark.parametrize("settings", [{"name": name} for name in NAMES] + [{"name": "sgd", "nesterov": True}])
def test_a_resumed_optimizer_goes_on_to_the_last_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    first = engine(Optim(**settings))
    steps(first, 0, 4)
    again = engine(Optim(**settings))
    again.load_state(saved(tmp_path, first.state()))
    assert steps(again, 4, 9) == steps(first, 4, 9)
    for mine, theirs in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_textbooks(nesterov: bool) -> None:
    optim = Optim(name="sgd", momentum=0.8, nesterov=nesterov, weight_decay=0.1)
    made = engine(optim)
    weights = [p.detach().clone().requires_grad_() for p in made.model.parameters()]
    speeds = [torch.zeros_like(w) for w in weights]
    steps(made, 0, 3)
    for step in range(3):
        named = dict(zip(dict(made.model.named_parameters()), weights, strict=True))
        found = loss(lambda x, named=named: torch.func.functional_call(made.model, named, x), step)
        for i, gradient in enumerate(torch.autograd.grad(found, weights)):
            pull = gradient + (0.1 * weights[i] if weights[i].ndim > 1 else 0)
            speeds[i] = pull if step == 0 else 0.8 * speeds[i] + pull
            move = pull + 0.8 * speeds[i] if nesterov else speeds[i]
            weights[i] = (weights[i] - 0.01 / (step + 1) * move).detach().requires_grad_()
    for mine, theirs in zip(made.model.parameters(), weights, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach())


def test_eight_bits_hold_the_large_moments_and_move_as_adamw_does() -> None:
    small, exact = engine(Optim(name="adamw8bit", weight_decay=0.1)), engine(Optim(weight_decay=0.1))
    before = [p.detach().clone() for p in small.model.parameters()]
    steps(small, 0, 5)
    steps(exact, 0, 5)
    for start, mine, theirs in zip(before, small.model.parameters(), exact.model.parameters(), strict=True):
        assert (mine - theirs).norm() < 0.05 * (theirs - start).norm()
    kinds = {key: tensor.dtype for key, tensor in small.state().items() if key.endswith("state1")}
    assert kinds["optimizer/0.weight/state1"] == torch.uint8
    assert kinds["optimizer/2.weight/state1"] == torch.float32, "fewer than 4,096 entries"
    moments = [t.nbytes for key, t in small.state().items() if key.startswith("optimizer/0.weight/state")]
    assert sum(moments) == 2 * 80 * 64


def test_without_bitsandbytes_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"^optim.name: needs bitsandbytes, .* 'snell_dist\[quantized\]'$"):
        engine(Optim(name="adamw8bit"))
