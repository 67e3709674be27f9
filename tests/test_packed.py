"""Packed matrices: close to the dense ones, exact in their own products, and small."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from snell_dist.config import ConfigError
from snell_dist.packed import PackedLinear, pack

SHAPES = [(96, 64), (33, 7), (1, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("nf4", 0.2)])
def test_dense_again_every_entry_is_near_to_what_it_was(kind: str, error: float, shape: tuple[int, int]) -> None:
    """In units of the largest entry of its block of 64: half of the code's widest step."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed, packing = pack(nn.Parameter(weight), kind)
    again = packing.dense(packed, torch.float32)
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True).expand_as(blocks).flatten()[: weight.numel()].view(shape)
    assert again.shape == shape
    assert ((again - weight).abs() <= error * scales).all()
    assert packed.dtype == torch.uint8
    assert packed.numel() == (weight.numel() if kind == "int8" else -(-weight.numel() // 2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_outputs_and_gradients_are_those_of_the_dense_matrix(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    packed = PackedLinear(linear, kind)
    dense = packed.merged()
    assert dense.bias is linear.bias
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    for mine, other in ((packed(x), dense(x)),):
        assert_close(mine, other)
        assert_close(torch.autograd.grad(mine.sum(), x), torch.autograd.grad(other.sum(), x))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16


def test_no_dense_matrix_waits_for_backward() -> None:
    packed = PackedLinear(nn.Linear(256, 256), "nf4")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        packed(torch.randn(2, 256, requires_grad=True))
    assert sum(kept) == 256 * 256 // 2


def test_without_bitsandbytes_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is missing"):
        PackedLinear(nn.Linear(4, 4), "int8")
