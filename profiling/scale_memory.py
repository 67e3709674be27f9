"""The predicted memory in the comments of configs/scale: looked up, or brought up to date.

    python profiling/scale_memory.py [--write]

The second line of each of those files says a machine and what a GPU of it needs; here it is predicted again.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from snell_dist.config import CONFIGS, load
from snell_dist.memory.gpus import GIB, find
from snell_dist.memory.overhead import Overhead
from snell_dist.memory.plan import Machine, own
from snell_dist.run_config import Run

FOLDER = CONFIGS / "scale"
SAID = re.compile(
    r"# a GPU needs (?P<needs>[\d.]+) GiB, (?P<predicted>[\d.]+) predicted:"
    r" snell plan (?P<config>\S+) --gpus (?P<gpus>\d+) --nodes (?P<nodes>\d+) --gpu (?P<gpu>\S+)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="correct the files")
    args = parser.parse_args()
    wrong = 0
    for file in files():
        said, found = second_line(file), predicted(file)
        print(f"{file.name:24} {found}{'' if said == found else f'   (says {said})'}")
        wrong += said != found
        if args.write:
            file.write_text(file.read_text().replace(said, found))
    return int(wrong > 0 and not args.write)


def files() -> list[Path]:
    """Those that say what a GPU needs."""
    return [file for file in sorted(FOLDER.glob("*.yaml")) if SAID.fullmatch(second_line(file))]


def second_line(file: Path) -> str:
    return file.read_text().splitlines()[1]


def predicted(file: Path) -> str:
    """What the second line should be."""
    said = SAID.fullmatch(second_line(file))
    assert said is not None
    config = load(str(file), [], Run).config
    option = own(config, Machine(int(said["gpus"]), int(said["nodes"]), find(said["gpu"], None)), Overhead())
    sizes = f"# a GPU needs {option.bytes / GIB:.2f} GiB, {option.footprint.peak_bytes / GIB:.2f} predicted:"
    return f"{sizes} snell plan {said['config']} --gpus {said['gpus']} --nodes {said['nodes']} --gpu {said['gpu']}"


if __name__ == "__main__":
    raise SystemExit(main())
