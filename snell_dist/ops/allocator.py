"""SNELLA's allocator: how sparse each matrix is, learned under one budget for all (SNELLA, released code).

Once an epoch the budget N of surviving entries falls from that of `initial` to that of `target` sparsity, with the cube
of the time left, and is shared among the matrices in proportion to how much their factors matter:

    v = |p dL/dp|,  I <- beta1 I + (1 - beta1) v,  U <- beta2 U + (1 - beta2) |v - I|     each factor, after each step
    score = mean(I_A U_A) + mean(I_B U_B)                                                each matrix

No tensor that trains is touched: only the sparsity, and with it the threshold, of each matrix moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MOST = math.nextafter(1, 0)
METRICS = ("sensitivity", "magnitude")


class Allocator:
    """sizes: entries of each matrix by name (in * out; the groups of a fused layer are matrices of their own).

    epochs: over which the budget falls; until `init_warmup` it is the initial one, in the last `final_warmup` the
    target. interval: allocate in epochs that are multiples of it. metric: `sensitivity` as above, or `magnitude`
    (v = |p|). averages, sparsity: where an earlier one stood; `observe` changes these averages in place.
    """

    def __init__(
        self, sizes: Mapping[str, int], *, initial: float, target: float, epochs: int, init_warmup: int = 0,
        final_warmup: int = 0, interval: int = 1, beta1: float = 0.85, beta2: float = 0.85, metric: str = "sensitivity",
        averages: Mapping[str, Iterable[tuple[Tensor, Tensor]]] | None = None,
        sparsity: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("initial", initial), ("target", target)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), a fraction of entries that are zero; got {value!r}")
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {value!r}")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        if epochs <= init_warmup + final_warmup:
            raise ValueError(
                f"epochs must exceed init_warmup + final_warmup = {init_warmup + final_warmup}; got {epochs}"
            )
        if interval < 1:
            raise ValueError(f"interval must be a positive number of epochs; got {interval}")
        if not sizes or min(sizes.values()) < 1:
            raise ValueError(f"sizes must name at least one matrix, each with entries; got {dict(sizes)!r}")
        self.sizes, self.initial, self.target, self.metric = dict(sizes), initial, target, metric
        self.epochs, self.init_warmup, self.final_warmup, self.interval = epochs, init_warmup, final_warmup, interval
        self.beta1, self.beta2 = beta1, beta2
        self.sparsity = dict.fromkeys(self.sizes, initial) if sparsity is None else dict(sparsity)
        self._averages = {name: list(pairs) for name, pairs in (averages or {}).items()}

    @torch.no_grad()
    def observe(self, name: str, factors: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """After a step: the factors of one matrix, each with its gradient (None counts as 0). No host sync."""
        if name not in self.sizes:
            raise ValueError(f"name must be one of the {len(self.sizes)} matrices given; got {name!r}")
        pairs = list(factors)
        known = self._averages.get(name) or [(torch.zeros_like(p), torch.zeros_like(p)) for p, _ in pairs]
        for (mean, spread), (p, grad) in zip(known, pairs, strict=True):
            if self.metric == "magnitude":
                value = p.abs()
            else:
                value = torch.zeros_like(p) if grad is None else (p * grad).abs().nan_to_num_(nan=0.0)
            mean.mul_(self.beta1).add_(value, alpha=1 - self.beta1)
            spread.mul_(self.beta2).add_((value - mean).abs(), alpha=1 - self.beta2)
        self._averages[name] = known

    def budget(self, epoch: int) -> float:
        """Entries that survive in all matrices together, in force during `epoch` (from 0)."""
        total = sum(self.sizes.values())
        first, last = (1 - self.initial) * total, (1 - self.target) * total
        if epoch <= self.init_warmup:
            return first
        if epoch > self.epochs - self.final_warmup:
            return last
        left = 1 - (epoch - self.init_warmup) / (self.epochs - self.final_warmup - self.init_warmup)
        return int(last + (first - last) * left**3)

    def scores(self) -> dict[str, float]:
        """Each matrix's share; they sum to 1. Equal shares before any gradient."""
        raw = {}
        for name in self.sizes:
            parts = [float((mean * spread).mean()) for mean, spread in self._averages.get(name, [])]
            raw[name] = sum(parts)
        total = sum(raw.values())
        return {n: s / total for n, s in raw.items()} if total > 0 else dict.fromkeys(raw, 1 / len(raw))

    def allocate(self, epoch: int) -> dict[str, float]:
        """Each matrix's sparsity for `epoch`, before training it; the old one in the warm-up and between intervals.

        It stays below 1, which `snell_linear` refuses, by the smallest step there is: then nothing survives.
        """
        if epoch > self.init_warmup and epoch % self.interval == 0:
            volumes = share(int(self.budget(epoch)), self.scores(), self.sizes)
            self.sparsity = {n: min(max(1 - volumes[n] / size, 0.0), MOST) for n, size in self.sizes.items()}
        return dict(self.sparsity)

    def state_dict(self) -> dict[str, Any]:
        """Averages and sparsities; all else is given at construction."""
        tensors = {
            f"{name}.{i}.{kind}": value
            for name, pairs in self._averages.items()
            for i, pair in enumerate(pairs)
            for kind, value in zip(("mean", "spread"), pair, strict=True)
        }
        return {"sparsity": dict(self.sparsity), "averages": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError if it was written for other matrices."""
        if set(state["sparsity"]) != set(self.sizes):
            odd = sorted(set(state["sparsity"]) ^ set(self.sizes))
            raise ValueError(f"state must be of the same matrices; {odd[0]!r} is only in one of the two")
        self.sparsity, self._averages = dict(state["sparsity"]), {}
        means = [key for key in state["averages"] if key.endswith(".mean")]
        for key in sorted(means, key=lambda k: int(k.split(".")[-2])):
            pair = state["averages"][key], state["averages"][key.removesuffix("mean") + "spread"]
            self._averages.setdefault(key.rsplit(".", 2)[0], []).append((pair[0].clone(), pair[1].clone()))


def share(budget: int, scores: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Whole entries in proportion to the scores, none above its size; what is left goes to those not full, again."""
    volumes = dict.fromkeys(sizes, 0)
    left = budget
    while left > 0:
        open_to = [n for n in sizes if volumes[n] < sizes[n] and scores[n] > 0]
        total = sum(scores[n] for n in open_to)
        given = {n: min(int(left * scores[n] / total), sizes[n] - volumes[n]) for n in open_to}
        if not any(given.values()):
            break
        for name, more in given.items():
            volumes[name] += more
        left -= sum(given.values())
    return volumes
