"""Do all engines compute the same? Every engine x recomputation x method x accumulation against one process.

    python profiling/parity_matrix.py [--processes 2 4] [--steps 20] [--out profiling/results/parity]

A small ViT on digits, CPU, gloo, one thread a process, float32. One process accumulates the micro-batches that the
ranks see; kinds of run:

plain     AdamW, no clipping: the same bits are due where every sum has the same order (accumulation 1, two processes)
clipped   SGD with momentum, gradients clipped to 0.5: relative differences of the losses at most 1e-6
float64   AdamW, everything in float64, ddp and fsdp: what is rounding shrinks to 1e-11, what is a mistake does not

and `resumed`: every engine goes on from the checkpoint of every other. Differences are the largest over all steps
(losses, relative) and all trained tensors (absolute). Writes OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import environment, where_run
from safetensors.torch import load_file

from snell_dist.doctor import parity
from snell_dist.doctor.trace import Case, Plan, Trace

CASE_S = 300  # in which a case must have ended
SMALL = [
    "backbone.weights=null", "backbone.width=16", "backbone.depth=2", "backbone.heads=2", "data.batch_size=16",
    "train.steps=20", "train.device=cpu",
]  # fmt: skip
_OF = parity.ENGINES
ENGINES = {
    "ddp": _OF["ddp"],
    "fsdp": _OF["fsdp"],
    "fsdp, replicated base": [*_OF["fsdp"], "engine.frozen=replicate"],
    "zero 0": _OF["zero0"],
    "zero 1": _OF["zero1"],
    "zero 2": _OF["zero2"],
    "zero 2, offloaded": [*_OF["zero2"], "engine.offload_optimizer=true"],
    "zero 3": _OF["zero3"],
    "zero 3, offloaded": [*_OF["zero3"], "engine.offload_optimizer=true", "engine.frozen=offload"],
}
METHODS = {
    "snell": ["method.rank=4"],
    "snella": ["method.name=snella", "method.rank=4", 'method.allocator={"target_sparsity": 0.9}'],
    "lora": ["method.name=lora", "method.rank=4"],
    "sparse": ["method.name=sparse"],
    "full": ["method.name=full"],
}
KINDS = {
    "plain": ["optim.lr=1e-3"],
    "clipped": ["optim.name=sgd", "optim.lr=0.05", "optim.clip_norm=0.5"],
    "float64": ["optim.lr=1e-3", "precision.compute=float64"],
}
READERS = {
    "one process": (1, []),
    "ddp, 2": (2, []),
    "fsdp, 2": (2, ENGINES["fsdp"]),
    "fsdp, 4": (4, ENGINES["fsdp"]),
    "zero 1, 2": (2, ENGINES["zero 1"]),
    "zero 3, 2": (2, ENGINES["zero 3"]),
}


@dataclass(frozen=True)
class Field:
    """One run of the matrix and the run of one process that it is held against."""

    kind: str
    engine: str
    method: str
    remat: str
    accumulation: int
    processes: int

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.kind, self.engine, self.method, self.remat, self.accumulation, self.processes)))

    @property
    def alone(self) -> str:
        return f"one-{self.kind}-{self.method}-{self.accumulation * self.processes}"

    def case(self) -> Case:
        micro = 16 // (self.processes * self.accumulation)
        said = [*ENGINES[self.engine], f"remat.policy={self.remat}", f"data.micro_batch_size={micro}"]
        return Case(self.name, [*SMALL, *METHODS[self.method], *KINDS[self.kind], *said])

    def case_alone(self) -> Case:
        micro = 16 // (self.processes * self.accumulation)
        return Case(self.alone, [*SMALL, *METHODS[self.method], *KINDS[self.kind], f"data.micro_batch_size={micro}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("profiling/results/parity"))
    args = parser.parse_args()
    chosen = [
        Field(kind, engine, method, remat, accumulation, processes)
        for processes in args.processes
        for kind in args.kinds
        for engine in args.engines
        if kind != "float64" or "zero" not in engine  # DeepSpeed reduces no float64
        for method in args.methods
        for remat in ("none", "block")
        for accumulation in (1, 2)
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        follow(out, {f.alone: f.case_alone() for f in chosen}.values(), args.steps, 1)
        for processes in args.processes:
            follow(out, [f.case() for f in chosen if f.processes == processes], args.steps, processes)
        report = {
            "environment": environment(),
            "steps": args.steps,
            "fields": [vars(f) | held_against(out, f.name, f.alone, 0) for f in chosen],
            "resumed": resumed(out, args.steps),
        }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def follow(out: Path, cases: Iterable[Case], steps: int, processes: int) -> None:
    """All cases in one job of so many processes."""
    parity.follow(Plan("demo", list(cases), steps, "cpu", out), processes if processes > 1 else 0, CASE_S)


def resumed(out: Path, steps: int) -> list[dict[str, Any]]:
    """Every ordered pair of READERS: the first saves half-way, the second goes on."""
    common, half = [*SMALL, *METHODS["snell"], *KINDS["plain"]], steps // 2
    own = {"one process": ["data.micro_batch_size=8"]}
    says = {name: [*common, *said, *own.get(name, [])] for name, (_, said) in READERS.items()}
    worlds = sorted({processes for processes, _ in READERS.values()})
    for world in worlds:
        writers = [name for name, (processes, _) in READERS.items() if processes == world]
        follow(out, [Case(name, says[name], save=half) for name in writers], steps, world)
    for world in worlds:
        readers = [name for name, (processes, _) in READERS.items() if processes == world]
        pairs = [(writer, reader) for reader in readers for writer in READERS]
        follow(out, [Case(f"{w} to {r}", says[r], resume=str(out / w)) for w, r in pairs], steps, world)
    return [{"writer": w, "reader": r} | held_against(out, f"{w} to {r}", w, half) for w in READERS for r in READERS]


def held_against(out: Path, name: str, other: str, start: int) -> dict[str, Any]:
    """Differences of a run from the same steps of another."""
    one, two = (Trace.read(out, n) for n in (name, other))
    if one.refused or one.died:
        return {"refused": one.refused, "died": one.died}
    assert one.losses is not None and two.losses is not None and one.norms is not None and two.norms is not None
    mine, theirs = (load_file(out / f"{n}.safetensors") for n in (name, other))
    losses = list(map(difference, one.losses, two.losses[start:]))
    return {
        "next_loss": losses[0],
        "loss": max(losses),
        "norm": max(map(difference, one.norms, two.norms[start:])),
        "weights": max((mine[key].double() - theirs[key].double()).abs().max().item() for key in theirs),
        "without_gradient": one.without_gradient,
        "frozen_moved": one.frozen_moved,
    }


def difference(one: float, other: float) -> float:
    """Relative."""
    return abs(one - other) / abs(other)


def markdown(report: dict[str, Any]) -> str:
    """Worst of methods and recomputation for each engine; then the pairs."""
    lines = []
    head = "| kind | processes | accumulation | engine | runs | same bits | **loss** | norm | trained tensors |"
    lines += [head, "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for field in report["fields"]:
        key = tuple(field[k] for k in ("kind", "processes", "accumulation", "engine"))
        groups.setdefault(key, []).append(field)
    for key, fields in groups.items():
        done = [f for f in fields if "loss" in f]
        same = sum(f["loss"] == 0 and f["weights"] == 0 for f in done)
        worst = [f"{max(f[k] for f in done):.1e}" if done else "-" for k in ("loss", "norm", "weights")]
        kind, processes, accumulation, engine = key
        lines.append(
            f"| {kind} | {processes} | {accumulation} | {engine} | {len(done)} | {same} | **{worst[0]}** | {worst[1]}"
            f" | {worst[2]} |"
        )
    bad = [f for f in report["fields"] if f.get("without_gradient") or f.get("frozen_moved")]
    ends = {end: sum(bool(f.get(end)) for f in report["fields"]) for end in ("refused", "died")}
    pairs = {}
    for field in report["fields"]:
        key = tuple(field[k] for k in ("kind", "engine", "method", "accumulation", "processes"))
        pairs.setdefault(key, []).append(tuple(field.get(k) for k in ("loss", "norm", "weights")))
    moved = sum(len(set(both)) > 1 for both in pairs.values())
    lines += [
        "",
        f"{len(report['fields'])} runs of {report['steps']} steps; refused: {ends['refused']}, died: {ends['died']}."
        f" Frozen bytes moved or a gradient missing: {len(bad)}. Recomputation changed a figure in {moved} of"
        f" {len(pairs)} pairs.",
    ]
    lines += [
        "",
        "Resumed half-way: the next loss / the worst loss / the worst trained tensor, against the writer going on.",
    ]
    lines += ["", f"| saved by | {' | '.join(READERS)} |", f"| --- |{' ---: |' * len(READERS)}"]
    found = {(r["writer"], r["reader"]): r for r in report["resumed"]}
    for writer in READERS:
        cells = [shown(found[writer, reader]) for reader in READERS]
        lines.append(f"| {writer} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", where_run(report["environment"]), ""])


def shown(found: dict[str, Any]) -> str:
    if "loss" not in found:
        return "refused" if found["refused"] else "DIED"
    if found["loss"] == 0 and found["weights"] == 0:
        return "same bits"
    return f"{found['next_loss']:.0e} / {found['loss']:.0e} / {found['weights']:.0e}"


if __name__ == "__main__":
    sys.exit(main())
