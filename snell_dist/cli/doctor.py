"""What is wrong with a machine, or with a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from snell_dist.cli._common import Commands
from snell_dist.exits import Exit


def add(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="the same numbers under every engine; what of this machine will hurt")
    verbs = doctor.add_subparsers(required=True, metavar="parity|env|hang")
    parity = verbs.add_parser(
        "parity",
        help="a few steps in one process and under every engine, compared",
        description="A few steps in one process and under every engine, compared. Exit status 2 where any is red.",
    )
    parity.add_argument("config", nargs="?", help="a YAML file or a shipped configuration (default: a small demo)")
    parity.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as optim.clip_norm=1")
    parity.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parity.add_argument("--steps", type=int, default=3, metavar="N", help="default: 3")
    parity.add_argument(
        "--engines", nargs="+", default=[], metavar="ENGINE", help="of ddp, fsdp, zero0 to zero3 (default: all)"
    )
    parity.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for each case (default: 600)")
    parity.add_argument("--json", action="store_true", help="for machines")
    parity.set_defaults(command=_doctor_parity)
    surroundings = verbs.add_parser(
        "env", help="versions, devices, limits and names of this machine, and what will hurt"
    )
    surroundings.add_argument("--json", action="store_true", help="for machines")
    surroundings.set_defaults(command=_doctor_env)

    stuck = verbs.add_parser("hang", help="which rank of a run keeps the others, where, and since when")
    stuck.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    stuck.set_defaults(command=_doctor_hang)


def _doctor_parity(args: argparse.Namespace) -> int:
    import tempfile

    from snell_dist import log
    from snell_dist.doctor import parity

    log.set_up()
    words = [word for word in (args.config, *args.overrides) if word is not None]
    source = words.pop(0) if words and "=" not in words[0] else None
    setting = parity.choose(source, words, args.processes, args.steps, args.engines)
    with tempfile.TemporaryDirectory(prefix="snell-parity-") as folder:
        report = parity.run(setting, Path(folder), args.timeout)
    if args.json:
        print(report.json())
    else:
        report.show()
    return Exit.BAD_INPUT if report.red else 0


def _doctor_env(args: argparse.Namespace) -> int:
    from snell_dist.doctor import env

    facts = env.look()
    print(env.as_json(facts) if args.json else env.text(facts))
    return 0


def _doctor_hang(args: argparse.Namespace) -> int:
    from snell_dist import hang
    from snell_dist.run_folder import config_of

    config_of(args.run)
    print("\n".join(hang.report(args.run)))
    return Exit.DONE
