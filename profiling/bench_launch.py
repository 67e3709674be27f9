"""From the command to the first step on two nodes, stage by stage: by the scripts under Slurm, and by torchrun.sh.

    python profiling/bench_launch.py [--rounds 5] [--out profiling/results/launch]

The nodes are network namespaces of this machine, as in tests/launch (root, Slurm and munge are needed); each trains
with one process. So processes of both nodes share its cores, and imports, which are most of the time, may take longer
than on two machines; they are measured by themselves as well. Stages are seen from outside, in the run folder.

queue        from sbatch's return to the job's output file
keep         to the first start of the command, by `snell keep`
meet         to run.json: launchers and ranks are imported, have met, the pre-flight is passed, the model is built
first step   to its line in metrics.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo import environment, where_run

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/launch")]

from nodes import Nodes  # noqa: E402  they need the path
from slurm import Slurm  # noqa: E402
from training import ENVIRONMENT, SETTINGS  # noqa: E402

SCRIPTS = "torchrun", "tasks", "deepspeed"
STAGES = "keep", "meet", "first step"
IMPORTS = "import torch", "import torch.distributed.run", "import snell_dist.job"
POLL_S, WAIT_S = 0.005, 90
PREFLIGHT = re.compile(r"preflight: .*\((\d+\.\d+) s\); .* in (\d+\.\d+) ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("profiling/results/launch"))
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment(), "rounds": args.rounds, "imports": imports(args.rounds)}
    with tempfile.TemporaryDirectory() as place, Nodes(2, Path(place)) as nodes:
        (Path(place) / "slurm").mkdir()
        slurm = Slurm(nodes, Path(place) / "slurm")
        report["starts"] = [
            {"how": how, **one(how, nodes, slurm, Path(place) / f"{how}-{i}")}
            for i in range(args.rounds + 1)  # the first of each warms up, and is not counted
            for how in (*(f"{script}.sbatch" for script in SCRIPTS), "torchrun.sh")
        ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def imports(rounds: int) -> dict[str, float]:
    """Median seconds of a process that does no more."""
    found = {}
    for line in IMPORTS:
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], env=ENVIRONMENT, check=True)
            seconds.append(time.perf_counter() - begin)
        found[line] = statistics.median(seconds)
    return found


def one(how: str, nodes: Nodes, slurm: Slurm, folder: Path) -> dict[str, float]:
    """Seconds of each stage."""
    folder.mkdir()
    run = folder / "run"
    env = ENVIRONMENT | {"RUN": str(run)}
    queue = 0.0
    if how.endswith(".sbatch"):
        words = ["--nodes=2", "--gpus-per-node=1", f"--chdir={folder}", ROOT / f"launch/slurm/{how}"]
        number = slurm.submit(*words, "demo", *SETTINGS, env=env)
        begin = time.perf_counter()
        until(lambda: slurm.job(number).out.exists())
        queue, begin = time.perf_counter() - begin, time.perf_counter()
        stages = watch(run, begin)
        slurm.wait(number)
    else:
        with typed(nodes, env) as begin:
            stages = watch(run, begin)
    found = PREFLIGHT.search(next(folder.glob("*.out")).read_text() if how.endswith(".sbatch") else "")
    return {"queue": queue, **stages, "preflight": float(found[1]) if found else 0.0}


@contextmanager
def typed(nodes: Nodes, env: dict[str, str]) -> Iterator[float]:
    """torchrun.sh on both, to its end."""
    env = env | {"NODES": " ".join(nodes.names)}
    words = [ROOT / "launch/torchrun.sh", "demo", *SETTINGS]
    begin = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    everyone = [subprocess.Popen(nodes.command(name, words), env=env, **quiet) for name in nodes.names]
    try:
        yield begin
        for process in everyone:
            process.wait(WAIT_S)
    finally:
        for process in everyone:
            process.kill()


def watch(run: Path, begin: float) -> dict[str, float]:
    found = {}
    for stage, file in zip(STAGES, (".launches.jsonl", "run.json", "metrics.jsonl"), strict=True):
        until(lambda file=file: (run / file).exists() and (run / file).stat().st_size > 0)  # type: ignore[misc]
        found[stage], begin = time.perf_counter() - begin, time.perf_counter()
    return found


def until(happens: Any) -> None:
    end = time.perf_counter() + WAIT_S
    while not happens():
        if time.perf_counter() > end:
            raise TimeoutError(f"nothing happened for {WAIT_S} s")
        time.sleep(POLL_S)


def markdown(report: dict[str, Any]) -> str:
    heads = ["start", "queue", *STAGES, "**job start to first step**", "most", "its pre-flight"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for how in dict.fromkeys(start["how"] for start in report["starts"]):
        mine = [start for start in report["starts"] if start["how"] == how][1:]
        whole = [sum(start[stage] for stage in STAGES) for start in mine]
        median = {key: statistics.median(start[key] for start in mine) for key in ("queue", *STAGES, "preflight")}
        said = [f"{median[key]:.2f} s" for key in ("queue", *STAGES)]
        flight = f"{median['preflight']:.2f} s" if median["preflight"] else ""
        lines.append([how, *said, f"**{statistics.median(whole):.1f} s**", f"{max(whole):.1f} s", flight])
    table = [f"| {' | '.join(cells)} |" for cells in lines]
    alone = ", ".join(f"`{line}` {seconds:.1f} s" for line, seconds in report["imports"].items())
    return "\n".join([*table, "", f"A process that only imports: {alone}.", "", where_run(report["environment"]), ""])


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
