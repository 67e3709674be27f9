"""Twelve training steps of the paper's released code, repeated by our methods on timm's model and our optimizer groups.

The released model keeps q, k and v as separate layers; ours adapts timm's fused qkv as three row groups.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import snell_dist
from snell_dist.optim import Optim, make_optimizer

GOLDEN = Path(__file__).parent / "golden"
CASES = {name: case for name, case in json.loads((GOLDEN / "cases.json").read_text()).items() if "tuning" in case}
LAYERS = {
    "attn.qkv": ("attn", "qkv"),
    "attn.proj": ("attn", ["proj"]),
    "mlp.fc1": ("mlp", ["fc1"]),
    "mlp.fc2": ("mlp", ["fc2"]),
}


def factors(data: dict[str, Tensor], prefix: str, i: int, parent: str, names: str | list[str]) -> tuple[Tensor, Tensor]:
    """One layer's stored factors in our layout: a [in, groups * rank], b [out, rank]."""
    a, b = [], []
    for name in names:
        key = f"{prefix}.blocks.{i}.{parent}.additional_{name}.learnable"
        if f"{key}.In_Qs" in data:
            a.append(torch.cat(list(data[f"{key}.In_Qs"]), 1))
            b.append(torch.cat(list(data[f"{key}.Out_Qs"]), 1))
        else:
            a.append(data[f"{key}.0.weight"].t())
            b.append(data[f"{key}.1.weight"])
    return torch.cat(a, 1), torch.cat(b, 0)


def ours(data: dict[str, Tensor], prefix: str, depth: int) -> dict[str, Tensor]:
    """The stored tensors that train, under our names."""
    found = {name: data[f"{prefix}.{name}"] for name in ("cls_token", "head.weight", "head.bias")}
    for i in range(depth):
        for layer, (parent, names) in LAYERS.items():
            found[f"blocks.{i}.{layer}.a"], found[f"blocks.{i}.{layer}.b"] = factors(data, prefix, i, parent, names)
    return found


def base(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored backbone under timm's names: q, k and v stacked."""
    state = {
        key.removeprefix("init."): value
        for key, value in data.items()
        if key.startswith("init.") and "additional" not in key
    }
    for key in [key for key in state if ".attn.q." in key]:
        state[key.replace(".q.", ".qkv.")] = torch.cat([state.pop(key.replace(".q.", f".{part}.")) for part in "qkv"])
    return state


def difference(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_training_agrees_with_the_released_code(name: str) -> None:
    case, data = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    options = {"embed_dim": case["embed_dim"], "depth": case["depth"], "num_heads": case["num_heads"]}
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=case["img_size"], patch_size=case["patch_size"], num_classes=7, **options
    )
    model.load_state_dict(base(data))
    method = {"rank": case["rank"], "also_train": ["head", "cls_token"]}
    if case["tuning"] == "snell":
        method["sparsity"] = float(case["sparsity"])
    snell_dist.adapt(model, case["tuning"], **method)
    start = ours(data, "init", case["depth"])
    assert start.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(start, strict=False)
    optimizer = make_optimizer(Optim(lr=case["lr"], weight_decay=0.01, eps=case["eps"]), model.named_parameters())

    losses = []
    for step, (images, labels) in enumerate(zip(data["images"], data["labels"], strict=True)):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        if step == 0:
            for key, gradient in ours(data, "grad0", case["depth"]).items():
                assert difference(model.get_parameter(key).grad, gradient) < 1e-5, key
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(losses, case["losses"], rtol=1e-6, atol=0)
    # AdamW amplifies the rounding of gradients near zero, so what trained is compared as one vector.
    final = ours(data, "final", case["depth"])
    mine = torch.cat([model.get_parameter(key).flatten() for key in final])
    assert difference(mine, torch.cat([tensor.flatten() for tensor in final.values()])) < 1e-5
