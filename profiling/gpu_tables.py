"""What `gpu_report.py` has measured, as JSON, as text and as a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import paper_memory
import yaml
from bench_operator import KEPT
from gpu_case import PEFT, configuration

from snell_dist.footprint import Footprint
from snell_dist.memory.gpus import MIB, in_words
from snell_dist.memory.overhead import Overhead
from snell_dist.report.memory import Page, Row, where

MARK = "CPU rehearsal: no figure here is of a GPU"
LARGE = 0.01  # of the peak: parts below that are named in the JSON only
RIVAL = PEFT
Report = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """said: what `gpu_case` is told."""

    name: str
    kind: str
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """found: what the case measured; or else the problem that kept it from that."""

    case: Case
    seconds: float
    found: dict[str, Any] | None = None
    problem: str | None = None


def as_json(
    rehearsal: bool, about: Mapping[str, Any], budget_s: float, outcomes: Sequence[Outcome], seconds: float
) -> Report:
    """All but the time lines, which only the page has."""
    return {
        "mark": MARK if rehearsal else None,
        "machine": dict(about),
        "budget_s": budget_s,
        "seconds": seconds,
        "cases": [_entry(outcome, about.get("idle_bytes")) for outcome in outcomes],
    }


def _entry(outcome: Outcome, idle: int | None) -> dict[str, Any]:
    case = outcome.case
    entry = {"name": case.name, "kind": case.kind, **case.said}
    entry |= {"seconds": round(outcome.seconds, 2), "problem": outcome.problem}
    if outcome.found is None or case.kind == "machine":
        return entry
    return entry | (
        _of_step(outcome.found, case.said["labels"]["batch"], idle) if case.kind == "memory" else outcome.found
    )


def _of_step(found: Mapping[str, Any], batch: int, idle: int | None) -> dict[str, Any]:
    predicted, recorded = found["predicted"]["peak_bytes"], found["measured"]["peak_bytes"]
    peak = Footprint.from_json(found["measured"]).peak
    return {
        "predicted_bytes": predicted,
        "recorded_bytes": recorded,
        "allocated_bytes": found["allocated_bytes"],
        "error": predicted / recorded - 1,
        "allocator_error": predicted / found["allocated_bytes"] - 1,
        "peak_at": where(peak),
        **{name: [(part, *sizes, _error(*sizes)) for part, *sizes in found[name]] for name in ("categories", "blocks")},
        "trainable": found["trainable"],
        "held_bytes": sum(found["measured"]["held"].values()),
        "device": found["device"],
        "only_a_gpu": only_a_gpu(found, idle),
        "step_s": found["step_s"],
        "recorded_s": found["recorded_s"],
        "images_per_s": batch / found["step_s"],
    }


def _error(predicted: int, measured: int) -> float | None:
    return predicted / measured - 1 if measured else None


def only_a_gpu(found: Mapping[str, Any], idle: int | None) -> dict[str, int]:
    """Bytes of a step that no tensor of it accounts for; what the device does not tell is missing.

    workspace      allocated between steps beside what the model and its optimizer hold: cuBLAS's
    kernels        allocated at the peak beside the recorded peak and the workspace: what kernels take for themselves
    fragmentation  reserved at most, beside the peak
    context        of the process by the driver, beside what is reserved (where the driver knows no processes: of the
                   whole device, less what was used before)
    """
    said, parts = found["device"], dict[str, int]()
    if "allocated" not in said:
        return parts
    parts["workspace"] = said["allocated"] - sum(found["measured"]["held"].values())
    parts["kernels"] = said["allocated_peak"] - found["measured"]["peak_bytes"] - parts["workspace"]
    parts["fragmentation"] = said["reserved_peak"] - said["allocated_peak"]
    mine = said.get("process")
    if mine is None and "used" in said and idle is not None:
        mine = said["used"] - idle
    if mine is not None:
        parts["context"] = mine - said["reserved"]
    return parts


# The page.


def page(report: Report, outcomes: Sequence[Outcome]) -> Page | None:
    """Every step that was measured, beside its prediction. None where none was."""
    entries = {entry["name"]: entry for entry in report["cases"]}
    steps = [o for o in outcomes if o.case.kind == "memory" and o.found is not None]
    if not steps:
        return None
    shared = set.intersection(*(set(_figures(entries[o.case.name])) for o in steps))
    rows = []
    for outcome in steps:
        found = outcome.found or {}
        figures = {name: size for name, size in _figures(entries[outcome.case.name]).items() if name in shared}
        both = Footprint.from_json(found["predicted"]), Footprint.from_json(found["measured"])
        beyond = sum(entries[outcome.case.name]["only_a_gpu"].values())
        rows.append(Row(outcome.case.said["labels"], found["trainable"], *both, beyond=beyond, figures=figures))
    return Page(
        title=title(report),
        ran=dict(_ran(report)),
        sentences=list(sentences(report)),
        rows=rows,
        series="method",
        over="batch",
        config=yaml.safe_dump(configuration(steps[0].case.said["labels"]).model_dump(), sort_keys=False),
        notes=list(_notes(report)),
    )


def title(report: Report) -> str:
    return report["mark"] or f"Training steps on {report['machine']['device']}, predicted and measured"


def _figures(entry: Mapping[str, Any]) -> dict[str, float]:
    found = {
        "allocator's peak MiB": entry["allocated_bytes"] / MIB,
        "off from it %": 100 * entry["allocator_error"],
        "step ms": 1000 * entry["step_s"],
        "images a second": entry["images_per_s"],
    }
    if "reserved_peak" in entry["device"]:
        found["reserved MiB"] = entry["device"]["reserved_peak"] / MIB
    return found | {f"{name} MiB": size / MIB for name, size in entry["only_a_gpu"].items()}


# The text.


def markdown(report: Report) -> str:
    parts = [
        f"# {title(report)}",
        "\n".join(f"- {sentence}" for sentence in sentences(report)),
        *_problems(report),
        *_steps(report),
        *_only_a_gpu(report),
        *_paper(report),
        *_turns(report),
        *_layers(report),
        *_snapshots(report),
        *_notes(report),
        "\n".join(f"- {name}: {text}" for name, text in _ran(report)),
    ]
    return "\n\n".join(parts) + "\n"


def sentences(report: Report) -> Iterator[str]:
    """The findings, the bad ones first."""
    without = [entry for entry in report["cases"] if entry["problem"]]
    if without:
        yield f"{len(without)} of {len(report['cases'])} cases have no figure: see why below."
    found = _measured(report, "memory")
    if found:
        worst = max(found, key=lambda entry: abs(entry["error"]))
        yield (
            f"The peaks of {len(found)} steps were predicted; the worst is off by {worst['error']:+.2%} from what the"
            f" ledger recorded ({worst['name']}),"
            f" the median by {statistics.median(abs(e['error']) for e in found):.2%}."
        )
        worst = max(found, key=lambda entry: abs(entry["allocator_error"]))
        yield (
            f"Beside the allocator's count the worst is off by {worst['allocator_error']:+.2%} ({worst['name']}), the"
            f" median by {statistics.median(abs(e['allocator_error']) for e in found):.2%}."
        )
    peaks = {(e["labels"]["backbone"], e["labels"]["method"]): e["allocated_bytes"] for e in found if _plain(e)}
    times = {entry["labels"]["backbone"]: entry for entry in _measured(report, "steps") if _plain(entry)}
    for backbone in dict.fromkeys(backbone for backbone, _ in peaks):
        own = peaks.get((backbone, "SNELL-8"))
        rivals = [rival for rival in (RIVAL, "sparse") if (backbone, rival) in peaks]
        if own is None or not rivals:
            continue
        ratios = [f"{own / peaks[backbone, rival]:.2f} × {rival}" for rival in rivals]
        yield f"{backbone}, batch 8, float32: a step of SNELL-8 peaks at {in_words(own)}: {', '.join(ratios)}."
        if backbone in times:
            seconds = times[backbone]["seconds_by_method"]
            yield f"{backbone}: that step takes {seconds['SNELL-8'] / seconds[RIVAL]:.2f} × {RIVAL}'s time."


def _plain(entry: Mapping[str, Any]) -> bool:
    labels = entry["labels"]
    said = labels["batch"], labels["precision"], labels["remat"], labels["attention"]
    return said == (8, "float32", "none", "fused")


def _problems(report: Report) -> Iterator[str]:
    rows = [[entry["name"], entry["problem"].replace("|", "/")] for entry in report["cases"] if entry["problem"]]
    if rows:
        yield "## Cases without a figure"
        yield _table(["case", "why"], rows, right=2)


def _steps(report: Report) -> Iterator[str]:
    found = sorted(_measured(report, "memory"), key=lambda entry: -abs(entry["allocator_error"]))
    if not found:
        return
    yield "## Steps beside their predictions"
    yield (
        "The worst first. Predicted against the ledger's record of the same step (the exact part) and against the"
        " allocator's peak, which counts what kernels and libraries take as well; the category and the block of a"
        " hundredth of the peak or more that are off the most; time of a step, and of one that is recorded."
    )
    heads = ["step", "peak in", "predicted", "ledger", "error", "allocator", "error", "worst category", "worst block"]
    heads += ["reserved", "step ms", "recorded", "images/s"]
    rows = []
    for e in found:
        row = [e["name"], e["peak_at"], in_words(e["predicted_bytes"]), in_words(e["recorded_bytes"])]
        row += [f"{e['error']:+.2%}", in_words(e["allocated_bytes"]), f"**{e['allocator_error']:+.2%}**"]
        row += [_worst(e["categories"], e["recorded_bytes"]), _worst(e["blocks"], e["recorded_bytes"])]
        row.append(in_words(e["device"]["reserved_peak"]) if "reserved_peak" in e["device"] else "")
        row += [f"{1000 * e['step_s']:.1f}", f"{e['recorded_s'] / e['step_s']:.1f} x", f"{e['images_per_s']:.1f}"]
        rows.append(row)
    yield _table(heads, rows, right=2)


def _worst(parts: Sequence[tuple[str, int, int, float | None]], peak: int) -> str:
    large = [(name, error) for name, _, size, error in parts if error is not None and size >= LARGE * peak]
    name, error = max(large, key=lambda part: abs(part[1]))
    return f"{name or 'outside'} {error:+.2%}"


def _only_a_gpu(report: Report) -> Iterator[str]:
    found = [entry for entry in _measured(report, "memory") if entry["only_a_gpu"]]
    if not found:
        return
    yield "## What only a GPU shows"
    guess, rows = Overhead(), []
    guesses = {"context": in_words(guess.context), "workspace": in_words(guess.workspace)}
    guesses["fragmentation"] = f"{guess.fragmentation:.0%} of the peak"
    for name in ("context", "workspace", "kernels", "fragmentation"):
        sizes = sorted(entry["only_a_gpu"][name] for entry in found if name in entry["only_a_gpu"])
        if not sizes:
            rows.append([name, "the driver does not tell", "", "", "", guesses.get(name, "")])
            continue
        shares = [e["only_a_gpu"][name] / e["allocated_bytes"] for e in found if name in e["only_a_gpu"]]
        middle = statistics.median(sizes)
        cells = [in_words(sizes[0]), in_words(middle), in_words(sizes[-1]), f"{statistics.median(shares):.1%}"]
        rows.append([name, *cells, guesses.get(name, "none")])
    yield _table(
        ["", "least", "median", "most", "median share of the peak", "estimated by `snell plan`"], rows, right=1
    )
    yield "\n".join(f"- {line.strip()}" for line in WORDS)


WORDS = (
    "context: of the process by the driver (nvidia-ml-py), beside what the allocator has reserved;",
    "workspace: allocated between steps beside what the model and its optimizer hold;",
    "kernels: allocated at the peak beside the recorded peak and the workspace;",
    "fragmentation: reserved at most, beside the allocator's peak.",
)


def _paper(report: Report) -> Iterator[str]:
    """The allocator's peaks where the paper's are: in 10^6 bytes."""
    printed = {
        (words, backbone): paper_memory.PAPER[row][size]
        for row, words in (("lora", "LoRA-8"), ("lora", RIVAL), ("snell", "SNELL-8"), ("sparse", "sparse"))
        for size, backbone in paper_memory.SIZES.items()
    }
    rows = []
    for entry in _measured(report, "memory"):
        key = entry["labels"]["method"], entry["labels"]["backbone"]
        if entry["labels"]["attention"] == "explicit" and key in printed:
            size, paper = entry["allocated_bytes"] / paper_memory.MB, printed[key]
            rows.append([*key, f"{size:,.0f}", f"{paper:,}", f"{size / paper - 1:+.1%}"])
    if rows:
        yield "## The paper's setting"
        yield "The allocator's peak under `configs/scale/paper_memory.yaml`, and the paper's; MB of 10^6 bytes."
        yield _table(["method", "backbone", "here", "paper", "difference"], rows, right=2)


def _turns(report: Report) -> Iterator[str]:
    found = _measured(report, "steps")
    if not found:
        return
    yield "## Whole steps, in turns"
    yield f"Forward, backward and AdamW at batch 8; medians of one process's rounds, over {RIVAL}'s of the same rounds."
    rows = []
    for entry in found:
        seconds, labels = entry["seconds_by_method"], entry["labels"]
        for method, taken in seconds.items():
            ratio = f"**{taken / seconds[RIVAL]:.2f}**"
            rate = f"{labels['batch'] / taken:.1f}"
            rows.append([labels["backbone"], labels["precision"], method, f"{1000 * taken:.2f}", ratio, rate])
    yield _table(["backbone", "precision", "method", "ms", f"over {RIVAL}", "images/s"], rows, right=3)


def _layers(report: Report) -> Iterator[str]:
    found = _measured(report, "operator")
    if not found:
        return
    yield "## One adapted layer, in turns"
    yield (
        "Forward and backward, rank 8; medians. Two products: the paper's structure. Frozen: the layer without an"
        " adapter. Peaks beside what is there before."
    )
    heads = ["layer", "precision", "ours ms", "over PEFT LoRA", "over frozen", "over two products", "for the threshold"]
    heads += ["peak MiB: ours", "PEFT LoRA", "two products", "frozen 10^12/s"]
    rows = []
    for entry in found:
        seconds, peaks, case = entry["seconds_by_method"], entry["peak_mib"], entry["case"]
        ours = seconds["ours"]
        row = [f"{case['in_features']}x{case['out_features']}", entry["precision"], f"{1000 * ours:.3f}"]
        row += [f"**{ours / seconds[rival]:.2f}**" for rival in ("PEFT LoRA", "frozen", "two products")]
        row.append(f"{1 - seconds[KEPT] / ours:.0%}")
        row += [f"{peaks[name]:.1f}" for name in ("ours", "PEFT LoRA", "two products")]
        rows.append([*row, f"{2 * entry['product_gflop'] / seconds['frozen'] / 1000:.3g}"])
    yield _table(heads, rows, right=2)


def _snapshots(report: Report) -> Iterator[str]:
    for entry in _measured(report, "snapshot"):
        if entry["file"] is None:
            yield "No snapshot: only CUDA's allocator keeps a history."
            continue
        yield (
            f"The allocator's history of one step ({entry['name']}, {entry['events']:,} events): `{entry['file']}`;"
            " open it on https://pytorch.org/memory_viz."
        )


def _notes(report: Report) -> Iterator[str]:
    if report["mark"]:
        yield f"{MARK}. Small models show that it works from start to end, and that predictions hold."
        yield (
            "On a CPU the batch is the caller's and stays there (as predicted for a GPU it goes after forward), and"
            " kernels take room of their own, which the allocator counts and no ledger sees."
        )
    yield "sparse: full sparse tuning. bfloat16: products by autocast, and the frozen base stored so."
    yield "Attention explicit: the paper's setting (`configs/scale/paper_memory.yaml`), of 100 classes; else 1,000."


def _ran(report: Report) -> Iterator[tuple[str, str]]:
    machine = report["machine"]
    yield "date", machine["date"]
    device = [machine["device"]]
    if "memory_bytes" in machine:
        device += [in_words(machine["memory_bytes"]), f"driver {machine['driver'] or 'unknown'}"]
        device += [f"{name}={value}" for name, value in machine["settings"].items()]
    yield "device", ", ".join(device)
    yield "host", machine["machine"]
    yield (
        "versions",
        ", ".join(f"{name} {v}" for name, v in {"Python": machine["python"], **machine["versions"]}.items()),
    )
    if "float32_products" in machine:
        yield "float32 products", machine["float32_products"]
    yield "command", machine["command"]
    yield "time", f"{report['seconds']:.0f} s, of {report['budget_s']:.0f} s at most"


def _measured(report: Report, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in report["cases"] if entry["kind"] == kind and not entry["problem"]]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> str:
    """right: the first column that is aligned so."""
    rule = ["---"] * right + ["---:"] * (len(heads) - right)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))
