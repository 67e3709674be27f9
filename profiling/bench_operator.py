"""What one adapted layer costs: forward and backward time and temporary memory, against its rivals, in one run.

    python profiling/bench_operator.py [--rounds 7] [--quick] [--out profiling/results/operator]

ours          snell_linear, as the methods use it (thresholds remembered between steps)
two products  the paper's structure, written by us: frozen and delta product apart, the delta made by the library's
              cdist and quantile inside activation checkpointing, so it is made twice a step
PEFT LoRA     the same rank on the same layer
ours, threshold kept   the same without finding the threshold: the difference is what finding it costs
frozen        the layer without an adapter: forward and dX

The contenders take turns within a round; figures are medians over rounds and the ratios those of the same run.
Time is for forward and backward. Memory is the most that was allocated at once (a count by torch's profiler, in a pass
of its own) less what any form must hand back (y, dx, da, db), in float32 matrices of the layer's size, W.
Writes OUT.json, OUT.md, OUT.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from demo import environment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from snell_dist import ops
from snell_dist.memory.measure import MIB, memory_profiler, peak_of


@dataclass(frozen=True)
class Case:
    in_features: int
    out_features: int
    tokens: int = 8 * 197  # a batch of 8 images of a ViT/16 at 224
    rank: int = 32
    sparsity: float = 0.9
    dropout: float = 0.0

    def __str__(self) -> str:
        dropped = f" dropout {self.dropout}" if self.dropout else ""
        shape = f"{self.in_features}x{self.out_features}"
        return f"{shape} tokens {self.tokens} rank {self.rank} sparsity {self.sparsity}{dropped}"


SHAPES = [(768, 768), (768, 3072), (1024, 4096), (1280, 5120), (1664, 8192)]
MAIN = [Case(*shape) for shape in SHAPES]
DROPPED = [Case(*shape, dropout=0.1) for shape in SHAPES]
VARIED = [
    *(Case(768, 3072, tokens=tokens) for tokens in (197, 4 * 8 * 197)),
    *(Case(768, 3072, rank=rank) for rank in (8, 16)),
    *(Case(768, 3072, sparsity=sparsity) for sparsity in (0.0, 0.5, 0.99)),
]
Step = Callable[[], None]
KEPT = "ours, threshold kept"
CPU = torch.device("cpu")


def contenders(case: Case, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """A forward and backward of each, on the same input, weight and upstream gradient.

    dtype bfloat16: of these three, and of products by autocast; what trains is float32.
    """
    torch.manual_seed(0)
    with device:
        weight = torch.randn(case.out_features, case.in_features).mul_(case.in_features**-0.5).to(dtype)
        x = torch.randn(8, case.tokens // 8 or 1, case.in_features)[:, : case.tokens // 8].to(dtype).requires_grad_()
        upstream = torch.randn(*x.shape[:-1], case.out_features).to(dtype)
        a, b = (nn.Parameter(t) for t in ops.init_factors(case.in_features, case.out_features, case.rank))
        peft_layer = peft_lora(case, weight)

    def ours(memory: ops.ThresholdState) -> Tensor:
        settings = {"sparsity": case.sparsity, "dropout": case.dropout, "training": True, "state": memory}
        return ops.snell_linear(x, weight, None, a, b, **settings)

    def two_products() -> Tensor:
        delta = checkpoint(released_delta, a, b, case.sparsity, use_reentrant=False)
        return F.linear(x, weight) + F.linear(F.dropout(x, case.dropout), delta)

    forwards = {
        "ours": functools.partial(ours, ops.ThresholdState()),
        KEPT: functools.partial(ours, ops.ThresholdState(refresh_every=10**9)),
        "two products": two_products,
        "PEFT LoRA": lambda: peft_layer(x),
        "frozen": lambda: F.linear(x, weight),
    }
    trained = [x, a, b, *peft_layer.parameters()]

    def step_of(forward: Callable[[], Tensor]) -> Step:
        def step() -> None:
            for tensor in trained:
                tensor.grad = None
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = forward()
            y.backward(upstream)

        return step

    return {name: step_of(forward) for name, forward in forwards.items()}


def released_delta(a: Tensor, b: Tensor, sparsity: float) -> Tensor:
    """The paper's delta by the library's distance and quantile (SNELL, section 3, in the released form)."""
    (a1, a2), (b1, b2) = a.chunk(2, 1), b.chunk(2, 1)
    k = 0.1 * torch.cdist(b1, a1) - 0.1 * torch.cdist(b2, a2)
    if sparsity == 0:
        return k
    magnitude = k.detach().abs()
    threshold = torch.quantile(magnitude.flatten(), sparsity)
    return k * torch.where(magnitude > threshold, magnitude, 0)


def peft_lora(case: Case, weight: Tensor) -> nn.Module:
    import peft

    base = nn.Sequential(nn.Linear(case.in_features, case.out_features, bias=False))
    base[0].weight = nn.Parameter(weight)
    settings = peft.LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=["0"], lora_dropout=case.dropout)
    return peft.get_peft_model(base, settings)


def interleaved(
    steps: dict[str, Step],
    rounds: int,
    device: torch.device = CPU,
    warm_up: int = 1,
    calls: int = 1,
    most_s: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each step; the contenders take turns, each for so many calls. After `most_s` two turns are enough."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for turn in range(warm_up + rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device, calls))
        if turn and time.perf_counter() - began > most_s:
            break
    return {name: found[min(warm_up, len(found) - 1) :] for name, found in seconds.items()}


def seconds_of(step: Step, device: torch.device, calls: int) -> float:
    """Of one call; on a GPU by its own clock, from when it begins with the first to when it has done the last."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - began) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def peak_mib(step: Step, device: torch.device = CPU) -> float:
    """The most that a step has at once beside what is there before it."""
    step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with memory_profiler() as profiler:
        step()
    return peak_of(profiler) / MIB


def measure(case: Case, rounds: int) -> dict[str, Any]:
    steps = contenders(case)
    medians = {name: statistics.median(s) for name, s in interleaved(steps, rounds).items()}
    product = 2 * case.tokens * case.in_features * case.out_features
    matrix = 4 * case.in_features * case.out_features / MIB
    peaks = {name: peak_mib(step) for name, step in steps.items()}
    # What any implementation must hand back: y, dx, da, db.
    returned = 4 * (case.tokens + case.rank) * (case.in_features + case.out_features) / MIB
    return {
        "case": str(case),
        **asdict(case),
        "seconds": medians,
        "ratio_two_products": medians["ours"] / medians["two products"],
        "ratio_lora": medians["ours"] / medians["PEFT LoRA"],
        "threshold_share": 1 - medians[KEPT] / medians["ours"],
        "peak_mib": peaks,
        "matrix_mib": matrix,
        "temporary_matrices": {name: (peaks[name] - returned) / matrix for name in ("ours", "two products")},
        "bound_gflop": 3 * product / 1e9,
        "bound_gflop_per_s": 3 * product / medians["ours"] / 1e9,
        "frozen_gflop_per_s": 2 * product / medians["frozen"] / 1e9,
    }


def whole_model(rounds: int) -> dict[str, Any]:
    """A training step (forward, backward, AdamW) of ViT-B/16 at batch 8: SNELL-8 against PEFT's LoRA-8."""
    import peft
    import timm

    import snell_dist

    images, labels = torch.randn(8, 3, 224, 224), torch.randint(0, 100, (8,))
    targets = ["qkv", "proj", "fc1", "fc2"]
    settings = peft.LoraConfig(
        r=8, lora_alpha=8, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2)", modules_to_save=["head"]
    )
    models = {
        "SNELL-8": snell_dist.adapt(
            timm.create_model("vit_base_patch16_224", num_classes=100), "snell",
            rank=8, sparsity=0.9, also_train=["head"], targets=[f"blocks.*.{name}" for name in targets],
        ),
        "PEFT LoRA-8": peft.get_peft_model(timm.create_model("vit_base_patch16_224", num_classes=100), settings),
    }  # fmt: skip

    def step_of(model: nn.Module) -> Step:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def step() -> None:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {name: step_of(model.train()) for name, model in models.items()}
    medians = {name: statistics.median(s) for name, s in interleaved(steps, rounds).items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        steps["SNELL-8"]()
    busiest = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)[:12]
    total = sum(e.self_cpu_time_total for e in profiler.key_averages())
    return {
        "seconds": medians,
        "ratio": medians["SNELL-8"] / medians["PEFT LoRA-8"],
        "peak_mib": {name: peak_mib(step) for name, step in steps.items()},
        "profile": {e.key: round(e.self_cpu_time_total / total, 4) for e in busiest},
    }


HEADINGS = ["layer", "ours", "two products", "ratio", "PEFT LoRA", "ratio", "frozen", "threshold"]
HEADINGS += ["temporaries: ours", "two products"]


def markdown(report: dict[str, Any]) -> str:
    lines = [HEADINGS, ["---"] + ["---:"] * 9]
    for r in report["layers"]:
        ms = {name: f"{1000 * value:.0f} ms" for name, value in r["seconds"].items()}
        ratios = [f"**{r[key]:.2f}**" for key in ("ratio_two_products", "ratio_lora")]
        times = [ms["ours"], ms["two products"], ratios[0], ms["PEFT LoRA"], ratios[1], ms["frozen"]]
        peaks = [f"{r['temporary_matrices'][name]:.2f} W" for name in ("ours", "two products")]
        lines.append([r["case"], *times, f"{r['threshold_share']:.1%}", *peaks])
    lines = [f"| {' | '.join(cells)} |" for cells in lines]
    if "vit_b" in report:
        v = report["vit_b"]
        lines += ["", f"ViT-B/16, batch 8, whole training step: SNELL-8 {v['seconds']['SNELL-8']:.2f} s, PEFT LoRA-8 "
                  f"{v['seconds']['PEFT LoRA-8']:.2f} s, ratio **{v['ratio']:.2f}**; peak beside the weights "
                  f"{v['peak_mib']['SNELL-8']:.0f} and {v['peak_mib']['PEFT LoRA-8']:.0f} MiB."]  # fmt: skip
    said = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    tail = f"{said['date']}, {said['machine']}, float32, Python {said['python']}, {versions}. `{said['command']}`"
    return "\n".join([*lines, "", tail, ""])


def draw(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    )
    colours = {"ours": "#d1495b", "two products": "#b5a89a", "PEFT LoRA": "#00798c", "frozen": "#66717e"}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    plain = [r for r in report["layers"] if r["case"] in {str(c) for c in MAIN}]
    dropped = [r for r in report["layers"] if r["dropout"]]
    panels = [
        ("Time of a step, over the frozen layer's", plain, lambda r, name: r["seconds"][name] / r["seconds"]["frozen"]),
        ("With adapter dropout 0.1", dropped, lambda r, name: r["seconds"][name] / r["seconds"]["frozen"]),
        (
            "Peak allocation, over the frozen layer's",
            plain,
            lambda r, name: r["peak_mib"][name] / r["peak_mib"]["frozen"],
        ),
    ]
    for ax, (title, rows, value) in zip(axes, panels, strict=True):
        names = ["ours", "two products", "PEFT LoRA"]
        for i, name in enumerate(names):
            places = [j + 0.27 * (i - 1) for j in range(len(rows))]
            bars = ax.bar(places, [value(r, name) for r in rows], 0.25, color=colours[name], label=name)
            ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        ax.axhline(1, color=colours["frozen"], linewidth=1)
        ax.set_xticks(range(len(rows)), [f"{r['in_features']}x{r['out_features']}" for r in rows])
        ax.set_title(title)
        ax.margins(y=0.12)
    axes[0].axhline(1.5, color="#222222", linewidth=0.8, linestyle=":")
    axes[0].text(len(plain) - 0.4, 1.53, "bound: 3 products", fontsize=7, ha="right")
    axes[0].legend(frameon=False, loc="upper left", ncols=3, fontsize=8, bbox_to_anchor=(0, 1.0))
    said = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    setting = "float32, 8 x 197 tokens, rank 32, sparsity 0.9"
    text = f"{said['date']}   {said['machine']}   {setting}   {versions}"
    figure.supxlabel(text, fontsize=7, color="#888888", x=0.01, ha="left")
    figure.savefig(file, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the two smallest layers, nothing else")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/operator"))
    args = parser.parse_args()
    cases = [*MAIN[:2], *DROPPED[:2]] if args.quick else [*MAIN, *DROPPED, *VARIED]
    report: dict[str, Any] = {"environment": environment(), "threads": torch.get_num_threads(), "layers": []}
    for case in cases:
        result = measure(case, args.rounds)
        report["layers"].append(result)
        said = f"{result['ratio_two_products']:.2f} of two products, {result['ratio_lora']:.2f} of PEFT LoRA"
        print(f"{case}: {1000 * result['seconds']['ours']:.0f} ms, {said}", file=sys.stderr)
    if not args.quick:
        report["vit_b"] = whole_model(args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(markdown(report))
    draw(report, args.out.with_suffix(".png"))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
