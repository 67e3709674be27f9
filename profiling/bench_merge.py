"""How much memory a merge takes: a finished run of a large ViT folded into timm's file, one tensor at a time.

    python profiling/bench_merge.py [--size huge] [--depth N] [--out profiling/results/merge]

A random base is written to a file, and a finished run's folder beside it, without training. Every case is a process of
its own, which has merged a tiny run before, so that all libraries are loaded.

held      the peak of the process's anonymous memory while it merges, looked at every few milliseconds, less what it had
          before; pages of the weights file are mapped, can be dropped at any moment, and do not count
resident  the same, where the C library's allocator keeps what is freed as it likes; for `held` it gives that back
largest   tensor that is written; the merge may hold one more of its size

The proof is what needs whole models, so it has a row of its own. Writes OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_start import MIB, Peak, anonymous_bytes
from demo import environment, where_run
from finished_runs import finish

from snell_dist import formats
from snell_dist.tensor_files import read_tensors

# Method, format, whether it is proven.
CASES = {
    "snell": ({"name": "snell", "rank": 8}, "timm", False),
    "snell, q and v alone": ({"name": "snell", "rank": 8, "targets": ["q", "v"]}, "timm", False),
    "snella": ({"name": "snella", "rank": 8}, "timm", False),
    "lora": ({"name": "lora", "rank": 8}, "timm", False),
    "dora": ({"name": "lora", "rank": 8, "dora": True}, "timm", False),
    "sparse": ({"name": "sparse", "criterion": "magnitude"}, "timm", False),
    "snell, to Transformers": ({"name": "snell", "rank": 8}, "hf", False),
    "snell, proven": ({"name": "snell", "rank": 8}, "timm", True),
}
TINY = {"name": "vit", "size": "tiny", "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 2}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: what is larger goes back when it is freed
SMALL = 0.02  # deviation of the base's weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="huge", help="of vit")
    parser.add_argument("--depth", type=int, help="fewer blocks than the size has")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("profiling/results/merge"))
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        name, folder = args.prepare
        made = {"name": "vit", "size": args.size} | ({"depth": args.depth} if args.depth else {})
        finish(Path(folder) / "run", made, CASES[name][0], scale=SMALL)
        return 0
    if args.case:
        print(json.dumps(measured(args.case[0], Path(args.case[1]))))
        return 0
    shape = ["--size", args.size, *(["--depth", str(args.depth)] if args.depth else [])]
    report: dict[str, Any] = {"environment": environment(), "size": args.size, "depth": args.depth, "cases": {}}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *shape]
            run([*command, "--prepare", name, folder])
            resident = json.loads(run([*command, "--case", name, folder]))["peak_bytes"]
            shutil.rmtree(f"{folder}/merged")
            found = json.loads(run([*command, "--case", name, folder], **GIVES_BACK))
            report["cases"][name] = {**found, "resident_bytes": resident}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def run(command: list[str], **environment: str) -> str:
    """The last line of what it prints."""
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=os.environ | quiet | environment, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def measured(name: str, folder: Path) -> dict[str, Any]:
    method, format, proven = CASES[name]
    tiny = finish(folder / f"tiny {os.getpid()}", TINY, {**method, "rank": 4} if "rank" in method else method)
    formats.export(tiny, format, tiny.with_suffix(".merged"))
    gc.collect()
    before, begin = anonymous_bytes(), time.perf_counter()
    with Peak() as peak:
        made = formats.export(folder / "run", format, folder / "merged", proven=proven)
    seconds = time.perf_counter() - begin
    written = read_tensors(next((folder / "merged").glob("*.safetensors")))
    return {
        "peak_bytes": peak.bytes - before,
        "largest_bytes": max(tensor.nbytes for tensor in written.values()),
        "file_bytes": made.bytes,
        "error": made.error,
        "seconds": seconds,
    }


def markdown(report: dict[str, Any]) -> str:
    depth = f", {report['depth']} blocks" if report["depth"] else ""
    lines = [
        f"vit/{report['size']}{depth}, merged in float32, one thread.",
        "",
        "| case | file | largest tensor | **held** | in largest tensors | resident | error of logits | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in report["cases"].items():
        peak, largest = row["peak_bytes"], row["largest_bytes"]
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            f"| {name} | {row['file_bytes'] / MIB:,.0f} MiB | {largest / MIB:.1f} MiB | **{peak / MIB:,.1f} MiB** "
            f"| {peak / largest:.2f} | {row['resident_bytes'] / MIB:,.1f} MiB | {error} | {row['seconds']:.1f} s |"
        )
    return "\n".join([*lines, "", where_run(report["environment"])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
