"""The operator on CUDA tensors that have no numbers (torch's FakeTensor): nothing in it is on another device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snell_dist.ops import KERNELS, fused
from snell_dist.ops.snell import make_plan, stack_params

CUDA = torch.device("cuda", 0)
TOKENS, IN, OUT, RANK, GROUPS = 34, 24, 48, 4, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_and_backward_stay_there(kernel: str, dropout: float, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        with CUDA:
            x, weight = torch.empty(2, TOKENS, IN, dtype=dtype), torch.empty(OUT, IN, dtype=dtype)
            a, b, bias = torch.empty(IN, GROUPS * RANK), torch.empty(OUT, RANK), torch.empty(OUT)
            upstream = torch.empty(2, TOKENS, OUT, dtype=dtype)
            seed = torch.zeros((), dtype=torch.int64) if dropout else None
        plan = make_plan(a, b, 0.9, kernel, "released", GROUPS, "group", dropout)
        params = stack_params(kernel, None, GROUPS, a)
        y, found = fused.forward(x, weight, bias, a, b, params, None, None, seed, None, plan)
        y, found = fused.forward(x, weight, bias, a, b, params, None, found, seed, None, plan)
        gradients = fused.backward(upstream, x, weight, a, b, params, found, seed, None, plan, True)
    made = [t for t in (y, found, *gradients) if isinstance(t, Tensor)]
    assert len(made) >= 5
    assert {t.device for t in made} == {CUDA}
