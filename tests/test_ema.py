"""The moving average against timm's and torch's, in every dtype, swapped in and out, and resumed."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from conftest import saved
from timm.utils import ModelEmaV2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from snell_dist.config import UserError
from snell_dist.ema import Average

DECAY = 0.9


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def moves(model: nn.Module, count: int) -> None:
    """Stands for an optimizer's step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.full_like(parameter, 0.1 * count))
            parameter.mul_(0.97)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_it_is_timms_and_torchs(decay: float) -> None:
    model = network()
    mine = Average(dict(model.named_parameters()), decay)
    timms = ModelEmaV2(model, decay)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    torchs.update_parameters(model)  # its first call takes the initial weights over
    for count in range(30):
        moves(model, count)
        mine.update()
        timms.update(model)
        torchs.update_parameters(model)
    for name, average in mine.state().items():
        name = name.removeprefix("ema/")
        torch.testing.assert_close(average, timms.module.get_parameter(name), rtol=1e-6, atol=1e-7)
        assert torch.equal(average, torchs.module.get_parameter(name))


def test_half_precision_does_not_lose_small_steps() -> None:
    """Against the sum itself in float64; a bfloat16 average would stand still."""
    wide, narrow = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    mine = Average({"wide": wide, "narrow": narrow}, 0.999)
    with torch.no_grad():
        wide.fill_(2)
        narrow.fill_(2)
    for _ in range(100):
        mine.update()
    for average in mine.state().values():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, torch.full((4,), 2 - 0.999**100))
    with mine.in_force():
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), mine.state()["ema/narrow"], rtol=2**-8, atol=0)


def test_in_force_the_model_is_the_average_and_then_itself_again() -> None:
    model, x = network(), torch.randn(4, 6)
    mine = Average(dict(model.named_parameters()), DECAY)
    moves(model, 1)
    mine.update()
    other = deepcopy(model)
    other.load_state_dict({name.removeprefix("ema/"): average for name, average in mine.state().items()})
    parameters, logits = list(model.parameters()), model(x)
    with pytest.raises(RuntimeError, match="in the middle"), mine.in_force():
        assert torch.equal(model(x), other(x))
        assert not torch.equal(model(x), logits)
        raise RuntimeError("in the middle")
    assert torch.equal(model(x), logits)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    model(x).sum().backward()  # the optimizer's tensors still train


def test_a_resumed_average_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    model = network()
    first = Average(dict(model.named_parameters()), DECAY)
    for count in range(3):
        moves(model, count)
        first.update()
    again = Average(dict(model.named_parameters()), DECAY)
    again.load_state(saved(tmp_path, first.state()))
    moves(model, 3)
    for average in (first, again):
        average.update()
    for name, tensor in first.state().items():
        assert torch.equal(tensor, again.state()[name])
    with pytest.raises(UserError, match="has 0 averages, this configuration 4"):
        again.load_state(saved(tmp_path, {"model/0.weight": torch.zeros(8, 6)}, 2))


def test_sharded_parameters_average_where_they_lie(tmp_path: Path) -> None:
    """One process under FSDP2: its parameters are DTensors, and the averages too."""
    torch_dist.init_process_group("gloo", store=torch_dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        # Else the gathered copies of the first forward would stay for the second.
        how = {"mesh": init_device_mesh("cpu", (1,)), "reshard_after_forward": True}
        plain, sharded = network(), fully_shard(network(), **how)
        averages = [Average(dict(model.named_parameters()), DECAY) for model in (plain, sharded)]
        for count in range(3):
            for model, average in zip((plain, sharded), averages, strict=True):
                moves(model, count)
                average.update()
        for one, two in zip(averages[0].state().values(), averages[1].state().values(), strict=True):
            assert isinstance(two, DTensor)
            assert torch.equal(one, two.full_tensor())
        x = torch.randn(4, 6)
        with averages[0].in_force(), averages[1].in_force():
            assert torch.equal(plain(x), sharded(x))
        assert torch.equal(plain(x), sharded(x))
    finally:
        torch_dist.destroy_process_group()
