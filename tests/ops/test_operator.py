"""What the fused operator promises beyond its numbers: what it keeps, its memory, its tiles, its state, compilation."""

from typing import Any

import golden
import pytest
import torch
from layers import close, layer, peak_bytes, run
from torch import Tensor
from torch._subclasses import FakeTensorMode

from snell_dist.ops import KERNELS, ThresholdState, fused, library, snell_linear
from snell_dist.ops.kernels import find
from snell_dist.ops.plan import Plan
from snell_dist.ops.snell import make_plan


def test_keeps_only_inputs_and_thresholds() -> None:
    """The parameter object itself, so that an engine may free it and bring it back; nothing of the matrix's size."""
    x, weight, bias, a, b, g = layer(64, 64, (4, 8))
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = snell_linear(x, weight, bias, a, b, sparsity=0.5)
    own = {t.data_ptr() for t in (x, weight, a, b)}
    assert any(t is weight for t in packed)
    assert all(t.data_ptr() in own or t.numel() == 2 for t in packed)
    want = torch.autograd.grad(y, (x, a, b), g, retain_graph=True)
    values = weight.detach().clone()
    weight.untyped_storage().resize_(0)  # as ZeRO-3 does between forward and backward
    weight.untyped_storage().resize_(values.numel() * 4)
    weight.data.copy_(values)
    for one, two in zip(torch.autograd.grad(y, (x, a, b), g), want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scope", ["group", "matrix"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_the_workspace_changes_nothing(kernel: str, scope: str, drop: float) -> None:
    parts = layer(40, 90, (4, 64), groups=3)
    how = {"sparsity": 0.7, "kernel": kernel, "groups": 3, "sparsity_scope": scope, "training": True}
    results = []
    for workspace in (None, 1, 5000, 50_000, 1 << 30):
        torch.manual_seed(1)
        results.append(run(parts, **how, drop_path=drop, workspace_bytes=workspace))
    for result in results[1:]:
        close(result, results[0])


def test_state_changes_no_result() -> None:
    x, weight, bias, a, b, g = layer(200, 300, (2, 9))
    state = ThresholdState()
    for _ in range(6):
        for one, two in zip(
            run((x, weight, bias, a, b, g), sparsity=0.9, state=state),
            run((x, weight, bias, a, b, g), sparsity=0.9), strict=True,
        ):  # fmt: skip
            assert torch.equal(one, two)
        with torch.no_grad():
            a.add_(0.02 * torch.randn_like(a).mul_(a.std()))
    with torch.no_grad():
        a.mul_(1000)  # far outside any bracket
    got = run((x, weight, bias, a, b, g), sparsity=0.9, state=state)
    assert torch.equal(got[0], run((x, weight, bias, a, b, g), sparsity=0.9)[0])


def test_refreshing_every_few_steps() -> None:
    x, weight, bias, a, b, _ = layer(64, 64)
    state, exact = ThresholdState(refresh_every=3), []
    seen = []
    for _ in range(6):
        for _ in range(2):  # a recomputed forward sees the same threshold
            y = snell_linear(x, weight, bias, a, b, sparsity=0.9, state=state)
        seen.append(torch.equal(y, snell_linear(x, weight, bias, a, b, sparsity=0.9)))
        exact.append(golden.error(y, snell_linear(x, weight, bias, a, b, sparsity=0.9)))
        state.step()
        with torch.no_grad():
            a.mul_(1.001)
    assert seen == [True, False, False, True, False, False]
    assert max(exact) < 1e-4
    snell_linear(x, weight, bias, a, b, sparsity=0.5, state=state)
    assert state.age == 0  # another sparsity renews it at once


def test_custom_op_registration() -> None:
    x, weight, bias, a, b, g = layer(groups=3)
    plan = make_plan(a, b, 0.5, "distance", "released", 3, "group")
    arguments = (x, weight, bias, a, b, None, None, None, None, None, *library.static(plan))
    torch.library.opcheck(library.linear, arguments)
    arguments = (g, x.detach(), weight, a.detach(), b.detach(), None, torch.zeros(2, 3), None, None)
    torch.library.opcheck(library.linear_backward, (*arguments, *library.static(plan), True))
    torch.library.opcheck(library.merge, (a.detach(), b.detach(), None, *library.static(plan)))


@pytest.mark.parametrize("how", [{}, {"dropout": 0.1, "drop_path": 0.1, "training": True}, {"kernel": "snella"}])
def test_compiles_without_a_graph_break(how: dict[str, Any]) -> None:
    x, weight, bias, a, b, g = layer()
    state = ThresholdState()

    def function(*inputs: Tensor) -> Tensor:
        return torch.relu(snell_linear(inputs[0], weight, bias, *inputs[1:], sparsity=0.5, state=state, **how))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled, compiled):
        torch.manual_seed(2)
        y = f(x, a, b)
        results.append([y.detach(), *torch.autograd.grad(y, (x, a, b), g)])
    close(results[1], results[0])
    close(results[2], results[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "how", [{}, {"dropout": 0.1}, {"path": True}, {"dtype": torch.bfloat16}, {"sparsify": "paper"}]
)
def test_no_value_is_read_on_the_host_for_cuda(kernel: str, how: dict[str, Any]) -> None:
    """Fake CUDA tensors have no values: whatever would read one, and so wait for the device, raises here."""
    plan = Plan(kernel, how.get("sparsify", "released"), 3, "group", (0.5, 0.6, 0.7), how.get("dropout", 0.0))
    with FakeTensorMode():
        x, g = (torch.empty(4, 5, n, device="cuda", dtype=how.get("dtype")) for n in (24, 36))
        weight, a, b = (torch.empty(s, device="cuda") for s in ((36, 24), (24, 24), (36, 8)))
        params = torch.empty(3, 3, device="cuda") if find(kernel).PARAMS else None
        seed = torch.empty((), device="cuda", dtype=torch.int64) if plan.dropout else None
        path = torch.empty(4, device="cuda") if how.get("path") else None
        y, found = fused.forward(x, weight, None, a, b, params, None, None, seed, path, plan)
        grads = fused.backward(g, x, weight, a, b, params, found, seed, path, plan, True)
    assert y.device.type == "cuda" and y.shape == (4, 5, 36)
    assert [t.shape for t in grads[:3]] == [x.shape, a.shape, b.shape]


def test_temporaries_stay_within_their_bound() -> None:
    """Counted by the profiler, beyond what is handed back: y, dx, da, db."""
    x, weight, bias, a, b, g = layer(512, 2048, (197,), 16)
    matrix = 4 * 512 * 2048
    for drop in (0.0, 0.1):
        for workspace in (None, 2 << 20):
            how: dict[str, Any] = {"sparsity": 0.9, "dropout": drop, "training": True, "workspace_bytes": workspace}
            snell_linear(x, weight, bias, a, b, **how)
            y, forward = peak_bytes(lambda how=how: snell_linear(x, weight, bias, a, b, **how))
            _, backward = peak_bytes(lambda y=y: torch.autograd.grad(y, (x, a, b), g))
            dropped = 3 * 4 * x.numel() if drop else 0  # the mask and the dropped copy, made anew and freed
            bound = (workspace or matrix) + dropped
            assert forward - 4 * y.numel() <= bound
            assert backward - 4 * (x.numel() + a.numel() + b.numel()) <= bound
