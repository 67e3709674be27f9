"""Reading the golden data: operators in this project's factor layout."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
CASES = json.loads((FOLDER / "cases.json").read_text())
OPERATORS = [name for name, case in CASES.items() if case.get("kind") in ("SNELL", "KLoRA", "SNELLA")]


@cache
def load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def factor(stored: Tensor) -> Tensor:
    """[2, features, r/2] as stored -> [features, r]."""
    return torch.cat(list(stored), 1)


def operator(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a case (factors and their gradients in our layout) and the keyword arguments it was run with."""
    data = dict(load(name))
    for key in ("A", "B", "gA", "gB"):
        data[key] = factor(data[key])
    kernel = "snella" if CASES[name]["kind"] == "SNELLA" else "distance"
    return data, {"sparsity": CASES[name]["sparsity"], "kernel": kernel}


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in norm, in float64."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())
