"""How long one resident base takes from one task's sparse delta to another's, and what each task costs.

    python profiling/bench_swap.py [--model vit_base_patch16_224] [--device cpu] [--out profiling/results/swap]

Two tasks of SNELL-8 with random factors on every linear layer, at each sparsity, on timm's model with random weights.

swap     from one task to the other: the base's entries come back, the other's are added; median of many, and the worst
bare     from a task to the base
reload   what it stands for: the merged weights of a task from a safetensors file, in the page cache, into the model
memory   of one more task beside the base: positions, values and its classifier
file     of `snell export --format delta`; positions as whichever of indices and a bitmap is smaller

At the end every bit of the base is compared with what it was before. Writes OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from demo import environment, where_run
from safetensors.torch import load_file, save_file
from torch import nn

from snell_dist import delta, methods
from snell_dist.anatomy import fingerprint
from snell_dist.delta import Delta, Entries, Resident

SPARSITIES = 0.9, 0.99
CLASSES = 100
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm's name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("profiling/results/swap"))
    args = parser.parse_args()
    device = torch.device(args.device)
    report: dict[str, Any] = {"environment": environment(), "model": args.model, "device": where(device)}
    report["threads"] = torch.get_num_threads()
    report["rows"] = [measure(args.model, sparsity, device, args.swaps) for sparsity in SPARSITIES]
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def where(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@torch.no_grad()
def measure(name: str, sparsity: float, device: torch.device, swaps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).to(device).eval()
    before = fingerprint(model, ())
    made = [task(name, model, sparsity, seed) for seed in (1, 2)]
    resident, row = Resident(model), {"sparsity": sparsity, "entries": made[0].count}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in (0, 1)]
        for file, one in zip(files, made, strict=True):
            delta.write(file, one)
        row["file_bytes"] = files[0].stat().st_size
        row["first_add_s"], _ = timed(lambda: resident.add("0", files[0]), device)
        row["add_s"], _ = timed(lambda: resident.add("1", files[1]), device)
        tensors = [t for e in made[0].entries.values() for t in (e.positions, e.values)]
        row["memory_bytes"] = sum(t.nbytes for t in (*tensors, *made[0].whole.values()))
        row["base_bytes"] = sum(t.nbytes for t in model.state_dict().values())
        resident.use("0")
        merged = Path(folder) / "merged.safetensors"
        save_file({n: t.cpu() for n, t in model.state_dict().items()}, merged)
        seconds = [timed(lambda i=i: resident.use(str(i % 2)), device)[0] for i in range(1, 2 * swaps + 1)][2:]
        row["swap_s"], row["swap_worst_s"] = statistics.median(seconds), max(seconds)
        row["bare_s"] = statistics.median(_bare(resident, device) for _ in range(swaps // 2))
        resident.use(None)
        row["base_is_back"] = fingerprint(model, ()) == before
        reload = lambda: model.load_state_dict(load_file(merged, device=str(device)))  # noqa: E731
        row["reload_s"] = statistics.median(timed(reload, device)[0] for _ in range(5))
    assert row["base_is_back"]
    return row


def _bare(resident: Resident, device: torch.device) -> float:
    resident.use("0")
    return timed(lambda: resident.use(None), device)[0]


def timed(action: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def task(name: str, base: nn.Module, sparsity: float, seed: int) -> Delta:
    """SNELL-8 with random factors on the shapes of the base."""
    torch.manual_seed(seed)
    twin = timm.create_model(name, num_classes=CLASSES)
    methods.adapt(twin, "snell", rank=8, sparsity=sparsity, also_train=["head"])
    entries = {}
    for path, layer in methods.adapted_layers(twin):
        layer.weight.zero_()
        entries[f"{path}.weight"] = Entries.of(layer.merged().weight)
    whole = {key: twin.state_dict()[key] for key in ("head.weight", "head.bias")}
    said = {"name": "snell", "rank": 8, "sparsity": sparsity}
    return Delta(entries, whole, name, fingerprint(base), ("head",), said, [f"class {i}" for i in range(CLASSES)])


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']} on {report['device']}, {report['threads']} threads, float32,"
        f" {report['rows'][0]['base_bytes'] / MIB:,.0f} MiB; two tasks of SNELL-8, {CLASSES} classes each.",
        "",
        "| sparsity | entries | file | memory of a task | **swap** | worst | bare | reload | add (first) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        mib = [f"{row[key] / MIB:,.1f} MiB" for key in ("file_bytes", "memory_bytes")]
        ms = [f"{1e3 * row[key]:,.1f} ms" for key in ("swap_s", "swap_worst_s", "bare_s", "reload_s")]
        adds = f"{row['add_s']:.2f} ({row['first_add_s']:.2f}) s"
        cells = [f"{row['sparsity']}", f"{row['entries']:,}", *mib, f"**{ms[0]}**", *ms[1:], adds]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Every bit of the base was its own again afterwards. {where_run(report['environment'])}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
