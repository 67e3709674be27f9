"""Twelve training steps of a small ViT against the released code: losses, first gradients, final parameters."""

from collections.abc import Callable

import golden
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from snell_dist.ops import ThresholdState, snell_linear

RUNS = ["train_snell_r8_s50", "train_klora_r8", "train_lora_r4"]
QKV = ("attn.q", "attn.k", "attn.v")
NAMES = (*QKV, "attn.proj", "mlp.fc1", "mlp.fc2")
Layer = Callable[[str, Tensor], Tensor]  # the adapted linear of a name


class Model:
    """The released model's parameters; each adapted layer's factors as the golden files store them, q, k, v apart."""

    def __init__(self, run: str, fused_qkv: bool, impl: str, dtype: torch.dtype) -> None:
        data, case = golden.load(run), golden.CASES[run]
        self.case, self.fused_qkv, self.impl, self.lora = case, fused_qkv, impl, case["tuning"] == "lora"
        self.p = {k.removeprefix("init."): v.to(dtype, copy=True) for k, v in data.items() if k.startswith("init.")}
        for name in case["trainable"]:
            self.p[name].requires_grad_()
        self.states: dict[str, ThresholdState] = {}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        block, layer = name.rsplit(".", 1)
        at = f"{block}.additional_{layer}.learnable."
        if self.lora:
            return self.p[at + "0.weight"].t(), self.p[at + "1.weight"]
        return golden.factor(self.p[at + "In_Qs"]), golden.factor(self.p[at + "Out_Qs"])

    def adapted(self, names: list[str], x: Tensor) -> Tensor:
        weight, bias = (torch.cat([self.p[f"{n}.{kind}"] for n in names]) for kind in ("weight", "bias"))
        a, b = zip(*map(self.factors, names), strict=True)
        return snell_linear(
            x, weight, bias, torch.cat(a, 1), torch.cat(b), sparsity=float(self.case["sparsity"]), groups=len(names),
            kernel="linear" if self.lora else "distance", impl=self.impl,
            state=self.states.setdefault(names[0], ThresholdState()),
        )  # fmt: skip

    def block(self, i: int, x: Tensor) -> Tensor:
        at, heads, width = f"blocks.{i}.", self.case["num_heads"], x.shape[-1]
        h = self.norm(at + "norm1", x)
        if self.fused_qkv:
            q, k, v = self.adapted([at + n for n in QKV], h).chunk(3, -1)
        else:
            q, k, v = (self.adapted([at + n], h) for n in QKV)
        q, k, v = (t.unflatten(-1, (heads, width // heads)).transpose(1, 2) for t in (q, k, v))
        attention = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + self.adapted([at + "attn.proj"], attention.transpose(1, 2).flatten(2))
        h = F.gelu(self.adapted([at + "mlp.fc1"], self.norm(at + "norm2", x)))
        return x + self.adapted([at + "mlp.fc2"], h)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"], 1e-6)

    def __call__(self, images: Tensor) -> Tensor:
        p = self.p
        patches = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], self.case["patch_size"])
        x = torch.cat([p["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        x = x + p["pos_embed"]
        for i in range(self.case["depth"]):
            x = self.block(i, x)
        return F.linear(self.norm("norm", x)[:, 0], p["head.weight"], p["head.bias"])


# AdamW makes a step of full size out of a gradient that is rounding noise, so where float32 ends depends on the
# processor: the released code's end is 3.4e-6 from the float64 one (klora), and ours was 1.1e-5 from the released
# code's on one machine, 6e-6 on another. So the whole vector of what trained is held to 1e-5 in float64, which has no
# such noise and ends alike everywhere.
@pytest.mark.parametrize(("dtype", "whole", "single"), [(torch.float64, 1e-5, 1e-4), (torch.float32, 3e-5, 1e-4)])
@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("fused_qkv", [False, True], ids=["apart", "fused_qkv"])
@pytest.mark.parametrize("run", RUNS)
def test_trajectory(run: str, fused_qkv: bool, impl: str, dtype: torch.dtype, whole: float, single: float) -> None:
    data, case = golden.load(run), golden.CASES[run]
    model = Model(run, fused_qkv, impl, dtype)
    groups = [
        {"params": [model.p[n] for n in group["parameters"]], "weight_decay": group["weight_decay"]}
        for group in case["weight_decay_groups"]
    ]
    optimizer = torch.optim.AdamW(groups, lr=case["lr"], eps=case["eps"])
    losses = []
    for step in range(case["steps"]):
        loss = F.cross_entropy(model(data["images"][step].to(dtype)), data["labels"][step])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name in case["trainable"]:
                grad = model.p[name].grad
                assert grad is not None
                assert golden.error(grad, data[f"grad0.{name}"]) < 1e-5, name
        optimizer.step()
        losses.append(float(loss.detach()))
    assert golden.error(torch.tensor(losses), data["losses"]) < 1e-6
    final = [(model.p[name].flatten(), data[f"final.{name}"].flatten()) for name in case["trainable"]]
    assert golden.error(*map(torch.cat, zip(*final, strict=True))) < whole
    assert max(golden.error(*pair) for pair in final) < single
