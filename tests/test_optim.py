import math

import pytest
import torch
from torch import nn

from snell_dist.optim import Optim, lr_at, make_optimizer


def test_vectors_and_tokens_do_not_decay() -> None:
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    model.fc = nn.Linear(4, 4)
    optimizer = make_optimizer(Optim(weight_decay=0.3), model.named_parameters())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(model.fc.weight): 0.3, id(model.fc.bias): 0.0, id(model.cls_token): 0.0}


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_cosine_is_torchs_own(warmup: int) -> None:
    optim, steps = Optim(lr=0.1, min_lr=0.01, warmup_steps=warmup), 40
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps - warmup, eta_min=0.01)
    for step in range(warmup, steps):
        assert math.isclose(lr_at(optim, step, steps, 1), sgd.param_groups[0]["lr"], rel_tol=1e-9)
        sgd.step()
        cosine.step()
    rates = [lr_at(optim, step, steps, 1) for step in range(warmup + 1)]
    assert rates == sorted(rates)
    assert rates[0] > 0


def test_constant_and_sgd() -> None:
    assert {lr_at(Optim(schedule="constant", lr=0.5), step, 9, 1) for step in range(9)} == {0.5}
    optimizer = make_optimizer(Optim(name="sgd", betas=[0.8, 0.0]), [("w", nn.Parameter(torch.zeros(2, 2)))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.8
