"""Meta tensors take kernels and casts of the device they stand for; the oracle: real CPU runs, torch's lists."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from snell_dist import methods
from snell_dist.backbones import section
from snell_dist.memory.standin import as_on, casts, standing_for
from snell_dist.optim import Optim, make_optimizer
from snell_dist.packed import PackedLinear
from snell_dist.precision import Precision

FAMILIES = {"vit": {}, "swin": {}, "convnext": {"image_size": 64}, "clip": {}}
METHODS = {"snell": {"rank": 4}, "lora": {"rank": 4}, "full": {}}


def strides(tensor: Tensor) -> list[int]:
    """Of the dimensions that have any."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


class Ops(TorchDispatchMode):
    """Each op that runs, with the dtypes, shapes and strides of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if "as_strided_" not in str(function):  # how meta kernels set strides
            leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
            self.log.append((str(function), [(t.dtype, tuple(t.shape), strides(t)) for t in leaves]))
        return made

    @property
    def names(self) -> list[str]:
        return [name.split(".")[1] for name, _ in self.log]


class Saved:
    """Storages that autograd keeps, in bytes."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self._alive: list[Tensor] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage.nbytes()
        self._alive.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def step(device: str, family: str, method: str, compute: str, attention: str | None = None) -> tuple[Ops, Saved]:
    """One forward and backward of the smallest model."""
    torch.manual_seed(0)
    said = type(section(family)).smallest | FAMILIES[family] | ({} if attention is None else {"attention": attention})
    backbone = section(family, **said).make(5)
    if method != "full":
        methods.adapt(backbone.model, method, also_train=["head"], **METHODS[method])
    model = backbone.model.to(device)
    images = torch.randn(4, *backbone.image_shape, device=device)
    labels = torch.zeros(4, dtype=torch.long, device=device)
    precision, saved = Precision(compute=compute), Saved()
    with standing_for("cpu") if device == "meta" else nullcontext(), Ops() as ops, saved.counted():
        with precision.autocast(images.device):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
    return ops, saved


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_meta_is_the_cpus_op_for_op(family: str, method: str, compute: str) -> None:
    (real, kept), (meta, meant) = step("cpu", family, method, compute), step("meta", family, method, compute)
    assert meta.log == real.log
    assert meant.bytes == kept.bytes


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["vit", "swin", "clip"])
def test_either_attention_is_the_cpus(family: str, method: str, attention: str) -> None:
    """Swin's bias trains with all else, and the CPU has no fused kernel for a bias that does."""
    (real, kept) = step("cpu", family, method, "bfloat16", attention)
    (meta, meant) = step("meta", family, method, "bfloat16", attention)
    assert meta.log == real.log
    assert meant.bytes == kept.bytes
    fused = "_scaled_dot_product_flash_attention_for_cpu" in real.names
    assert fused == (attention == "fused" and (family, method) != ("swin", "full"))


def test_casts_of_what_trains_live_until_autocast_ends() -> None:
    frozen, trained = torch.randn(8, 8, device="meta"), nn.Parameter(torch.randn(8, 8, device="meta"))
    x = torch.randn(2, 8, device="meta")
    with standing_for("cuda"), Ops() as ops:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(3):
                    F.linear(x, frozen)
                    F.linear(x, trained)
    shapes = [made[0][1] for name, made in ops.log if "_to_copy" in name]
    assert shapes.count((2, 8)) == 12  # x, each time
    assert shapes.count((8, 8)) == 2 * (3 + 1)


def test_autocast_stops_where_it_is_switched_off_and_after() -> None:
    layer, x = nn.Linear(8, 8, device="meta"), torch.randn(2, 8, device="meta")
    with standing_for("cuda"):
        assert layer(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == torch.float32
            assert layer(x.double().detach()[:, :0].float() @ torch.zeros(0, 8, device="meta")).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32  # torch casts nothing on meta


def test_real_tensors_are_left_alone() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
    with standing_for("cuda"), Ops() as ops, torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), want)
        q = torch.randn(1, 2, 5, 8)
        F.scaled_dot_product_attention(q, q, q)
    assert "_scaled_dot_product_flash_attention_for_cpu" in ops.names


def test_a_recomputed_forward_is_cast_again() -> None:
    layer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).to("meta")
    x = torch.randn(2, 8, device="meta", requires_grad=True)
    with standing_for("cuda"):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(layer, x, use_reentrant=False)
        with Ops() as ops:
            y.sum().backward()
    assert [made[0][0] for name, made in ops.log if "addmm" in name] == [torch.bfloat16]


def header_list(macro: str) -> set[str]:
    """Names of ops in a list of torch's own header: `_(conv_transpose2d, input)` is conv_transpose2d.input."""
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    body = re.search(rf"#define {macro}\(_\)(.*?)\n\n", text, re.S)
    assert body is not None
    return {
        match[1] + (f".{match[2]}" if match[2] else "") for match in re.finditer(r"_\((\w+)(?:, (\w+))?\)", body[1])
    }


def test_casts_on_a_gpu_are_those_of_torchs_header() -> None:
    kernels = {"cudnn_convolution", "cudnn_convolution_transpose"}  # registered beside the list
    assert set(casts.LOWERED["cuda"].split()) - kernels == header_list("AT_FORALL_LOWER_PRECISION_FP")
    assert set(casts.PROMOTED["cuda"].split()) == header_list("AT_FORALL_PROMOTE")
    assert set(casts.WIDENED["cuda"].split()) == header_list("AT_FORALL_FP32_SET_OPT_DTYPE")
    named = {*casts.LOWERED["cuda"].split(), *casts.PROMOTED["cuda"].split(), *casts.WIDENED["cuda"].split()}
    rest = set(casts.calls("cuda", casts.Cache())) - named - set(casts.RENAMED["cuda"])
    assert header_list("AT_FORALL_FP32") <= rest


X, Y = torch.randn(4, 4, 4), torch.randn(4, 4, 4).bfloat16()
CALLS: dict[str, Any] = {
    "linear": lambda x, y: F.linear(x, y[0]),
    "matmul": lambda x, y: x @ y,
    "einsum": lambda x, y: torch.einsum("bij,bjk->bik", x, y),
    "cat": lambda x, y: torch.cat([x, y]),
    "stack": lambda x, y: torch.stack([x, y]),
    "add": lambda x, y: x + y,
    "layer_norm": lambda x, y: F.layer_norm(y, (4,)),
    "softmax": lambda x, y: y.softmax(-1),
    "log_softmax": lambda x, y: F.log_softmax(y, -1),
    "sum": lambda x, y: y.sum(),
    "sum of a dim": lambda x, y: y.sum(0),
    "sum in a dtype": lambda x, y: y.sum(0, dtype=torch.bfloat16),
    "cumsum": lambda x, y: y.cumsum(0),
    "exp": lambda x, y: y.exp(),
    "pow": lambda x, y: y**2,
    "rsqrt": lambda x, y: y.abs().rsqrt(),
    "normalize": lambda x, y: F.normalize(y, dim=-1),
    "norm": lambda x, y: torch.norm(y),
    "norm of a dim": lambda x, y: torch.ops.aten.norm.ScalarOpt_dim(y, 2, [0]),
    "norm of a dim that stays": lambda x, y: torch.ops.aten.norm.ScalarOpt_dim(y, 2, [0], True),
    "norm.Scalar": lambda x, y: torch.ops.aten.norm.Scalar(y, 2),
    "mse_loss": lambda x, y: F.mse_loss(y, y),
    "cdist": lambda x, y: torch.cdist(y, y),
    "addcmul": lambda x, y: torch.addcmul(x, y, y),
    "gelu": lambda x, y: F.gelu(y),
    "mean": lambda x, y: y.mean(),
    "double": lambda x, y: x.double() @ x.double(),
}
ON_A_GPU = {
    "bfloat16": {"linear", "matmul", "einsum", "sum in a dtype", "gelu", "mean"},
    "float64": {"double"},
}


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_under_autocast(name: str) -> None:
    """On a GPU: torch's documented lists (https://docs.pytorch.org/docs/stable/amp.html), all else float32 here."""
    with torch.autocast("cpu", torch.bfloat16):
        on_cpu = CALLS[name](X, Y).dtype
    for stands in ("cpu", "cuda"):
        with standing_for(stands), torch.autocast("cpu", torch.bfloat16):
            found = CALLS[name](X.to("meta"), Y.to("meta")).dtype
        on_gpu = next((dtype for dtype, names in ON_A_GPU.items() if name in names), "float32")
        assert found == (on_cpu if stands == "cpu" else getattr(torch, on_gpu))


HALF, FULL = torch.bfloat16, torch.float32
AMPERE, HOPPER, TURING = (8, 0), (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "mask", "causal", "kernel"),
    [
        (AMPERE, FULL, 64, None, False, "_scaled_dot_product_efficient_attention"),
        (AMPERE, FULL, 64, torch.bool, False, "_scaled_dot_product_efficient_attention"),
        (AMPERE, FULL, 64, FULL, False, "_scaled_dot_product_efficient_attention"),
        (AMPERE, FULL, 6, None, False, "_safe_softmax"),  # heads not a multiple of 4
        (AMPERE, HALF, 64, None, False, "_scaled_dot_product_flash_attention"),
        (AMPERE, HALF, 64, None, True, "_scaled_dot_product_flash_attention"),
        (AMPERE, HALF, 20, None, False, "_scaled_dot_product_flash_attention"),
        (AMPERE, HALF, 320, None, False, "_scaled_dot_product_efficient_attention"),
        (AMPERE, HALF, 64, HALF, False, "_scaled_dot_product_efficient_attention"),
        (AMPERE, HALF, 20, HALF, False, "_safe_softmax"),
        (AMPERE, torch.float64, 64, None, False, "_safe_softmax"),
        (HOPPER, HALF, 64, None, False, "_scaled_dot_product_cudnn_attention"),
        (HOPPER, HALF, 64, HALF, False, "_scaled_dot_product_cudnn_attention"),
        (HOPPER, HALF, 20, None, False, "_scaled_dot_product_flash_attention"),
        (HOPPER, FULL, 64, None, False, "_scaled_dot_product_efficient_attention"),
        (TURING, HALF, 64, None, False, "_safe_softmax"),
        (TURING, torch.float16, 64, None, False, "_scaled_dot_product_efficient_attention"),
        (TURING, FULL, 6, None, False, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_attention_on_a_gpu(
    capability: tuple[int, int], dtype: torch.dtype, width: int, mask: torch.dtype | None, causal: bool, kernel: str
) -> None:
    q, k, v = (torch.randn(2, 3, 17, width, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
    bias = None if mask is None else torch.ones(17, 17, device="meta").to(mask)
    with standing_for("cuda", capability), Ops() as ops:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        y.sum().backward()
    assert kernel in ops.names
    assert (y.shape, y.dtype) == (q.shape, dtype)
    assert q.grad is not None and q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_what_a_gpu_keeps_of_attention_is_linear_in_the_tokens(dtype: torch.dtype) -> None:
    kept = []
    for tokens in (128, 256):
        saved = Saved()
        q, k, v = (torch.randn(1, 2, tokens, 64, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
        with standing_for("cuda"), saved.counted():
            F.scaled_dot_product_attention(q, k, v)
        kept.append(saved.bytes)
        # q, k, v, the output; a float32 for each row of scores; seeds
        assert saved.bytes == pytest.approx(q.nbytes * 4 + tokens * 2 * 4, abs=32)
    assert kept[1] == pytest.approx(2 * kept[0], abs=32)


@pytest.mark.parametrize(("stands", "bytes_each"), [("cpu", 4), ("cuda", 1)])
def test_dropout_keeps_a_mask_as_the_device_does(stands: str, bytes_each: int) -> None:
    x, saved = torch.randn(64, 64, device="meta", requires_grad=True), Saved()
    with standing_for(stands), saved.counted():
        F.dropout(x, 0.1).sum().backward()
        assert saved.bytes == 64 * 64 * bytes_each
        F.dropout(x, 0.1, training=False)
        F.dropout(x, 0.0)
    assert saved.bytes == 64 * 64 * bytes_each


def test_heads_are_joined_by_a_view() -> None:
    for stands, capability in (("cpu", AMPERE), ("cuda", AMPERE), ("cuda", HOPPER)):
        qkv = torch.randn(2, 17, 3, 4, 16, device="meta", dtype=HALF).permute(2, 0, 3, 1, 4)
        with standing_for(stands, capability):
            y = F.scaled_dot_product_attention(*qkv.unbind()).transpose(1, 2)
        assert y.reshape(2, 17, 64).untyped_storage()._cdata == y.untyped_storage()._cdata, (stands, capability)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mask", [None, (17, 17), (1, 3, 17, 17), (2, 1, 1, 17), "trains", "bool"])
@pytest.mark.parametrize("shape", [(2, 3, 17, 8), (3, 17, 8)])
def test_attention_on_the_cpu_is_torchs_own_choice(mask: Any, shape: tuple[int, ...], dropout: float) -> None:
    found = []
    for device in ("cpu", "meta"):
        q = torch.randn(shape, device=device, requires_grad=True)
        bias = None
        if mask is not None:
            bias = torch.ones(mask if isinstance(mask, tuple) else (17, 17), device=device)
            bias = bias.bool() if mask == "bool" else bias.requires_grad_(mask == "trains")
        saved = Saved()
        with standing_for("cpu") if device == "meta" else nullcontext(), Ops() as ops, saved.counted():
            F.scaled_dot_product_attention(q, q, q, attn_mask=bias, dropout_p=dropout).sum().backward()
        found.append((ops.names, saved.bytes))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_packed_weights_are_the_cpus(kind: Any) -> None:
    layers = [PackedLinear(nn.Linear(130, 96, device=device), kind) for device in ("cpu", "meta")]
    real, meta = ([(n, t.shape, t.dtype) for n, t in layer.state_dict().items()] for layer in layers)
    assert meta == real
    x = torch.randn(4, 130, device="meta", requires_grad=True)
    with standing_for("cuda"), torch.autocast("cpu", torch.bfloat16):
        y = layers[1](x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)  # type: ignore[union-attr]


SHAPES = [("w", (96, 80)), ("b", (9,))]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_optimizer_states_are_the_cpus_after_two_steps(name: Any, device_type: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        named = [(n, nn.Parameter(torch.ones(shape, device=device))) for n, shape in SHAPES]
        optimizer = make_optimizer(Optim(name=name), named)
        as_on(device_type, optimizer)
        for _ in range(2):
            for _, p in named:
                p.grad = torch.ones_like(p)
            optimizer.step()
        states = [optimizer.state[p].items() for _, p in named]
        found.append([(key, v.shape, v.dtype) for state in states for key, v in state if isinstance(v, Tensor)])
    assert found[0] == found[1]


def test_a_gpus_optimizer_goes_over_all_tensors_at_once() -> None:
    for device_type, together in (("cuda", True), ("cpu", False)):
        named = [("w", nn.Parameter(torch.randn(8, 8, device="meta")))]
        optimizer = make_optimizer(Optim(), named)
        as_on(device_type, optimizer)
        named[0][1].grad = torch.ones_like(named[0][1])
        with Ops() as ops:
            optimizer.step()
        assert any(name.startswith("_foreach") for name in ops.names) == together
