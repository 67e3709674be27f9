"""Runs: training, keeping alive, stopping, looking, measuring, reproducing."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from snell_dist import dist
from snell_dist.cli._common import Commands, takes_config, tell_keeper
from snell_dist.config import UserError
from snell_dist.exits import Exit


def add(commands: Commands) -> None:
    train = commands.add_parser("train", help="train a configuration", description="Train a configuration.")
    takes_config(train)
    train.add_argument("--out", type=Path, default=Path("runs"), help="where run folders are made (default: runs)")
    train.add_argument("--folder", type=Path, help="this run folder instead of a new numbered one")
    again = train.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue the newest run of this configuration, or --folder"
    )
    again.add_argument(
        "--resume-if-any", dest="resume", action="store_const", const="if any", help="begin, or continue what has begun"
    )
    train.set_defaults(command=_train)

    kept = commands.add_parser(
        "keep",
        usage="snell keep RUN [--attempts K] [--grace SECONDS] [--pause SECONDS] [--silence SECONDS] -- COMMAND ...",
        help="start training again after failures, until its run is complete",
        description="Runs COMMAND, which trains in RUN, again after failures until RUN is complete. SIGUSR1 (a time"
        " limit is near) and SIGTERM have all ranks save and stop; after SIGUSR1 a Slurm job goes back to the queue.",
    )
    kept.add_argument("run", type=Path, metavar="RUN", help="the run folder, as COMMAND's --folder says it")
    kept.add_argument("--attempts", type=int, default=3, metavar="K", help="without a newer checkpoint (default: 3)")
    kept.add_argument("--grace", type=float, default=120, metavar="SECONDS", help="to save and stop (default: 120)")
    kept.add_argument(
        "--pause", type=float, default=2, metavar="SECONDS", help="after a failure, doubled each (default: 2)"
    )
    kept.add_argument(
        "--silence", type=float, default=180, metavar="SECONDS", help="of all ranks, to start again (default: 180)"
    )
    kept.set_defaults(command=_keep)

    stopped = commands.add_parser("stop", help="have a run save and stop, wherever it is")
    stopped.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    stopped.add_argument("--within", type=float, default=600, metavar="SECONDS", help="to wait for it (default: 600)")
    stopped.set_defaults(command=_stop)

    told = commands.add_parser("status", help="how a run is: step, rate, time left, checkpoint, attempts, who is late")
    told.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    told.add_argument("--json", action="store_true", help="for machines")
    told.set_defaults(command=_status)

    logs = commands.add_parser("logs", help="what all ranks of a run said, in the order of time")
    logs.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    logs.add_argument("--rank", type=int, metavar="N", help="only this one")
    logs.add_argument("--follow", action="store_true", help="until the run is complete")
    logs.set_defaults(command=_logs)

    measure = commands.add_parser(
        "eval",
        help="accuracy of a base before training, of a finished run, or of what was exported",
        description="Accuracy and loss of a configuration's base as it is (zero-shot, for CLIP), of a finished run, or,"
        " with --data, of a run or of what snell export wrote, served by its own library.",
    )
    measure.add_argument("config", help="a configuration, a run folder; with --data: what snell export wrote")
    measure.add_argument(
        "--data", metavar="CONFIG", help="whose images to look at; overrides are of this configuration"
    )
    measure.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    measure.add_argument("--split", choices=["val", "test"], default="test", help="which images (default: test)")
    measure.add_argument("--out", type=Path, default=Path("runs"), help="where bases are trained (default: runs)")
    measure.set_defaults(command=_eval)

    reproduce = commands.add_parser(
        "reproduce",
        help="a benchmark's methods, tasks and seeds, and the table beside the paper's",
        description="Runs or resumes a benchmark's matrix of methods, tasks and seeds, and prints its table.",
    )
    reproduce.add_argument("benchmark", help="vtab, fgvc or mini")
    reproduce.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, such as train.epochs=10")
    reproduce.add_argument("--data", metavar="DIR", help="where the data is (default: as the benchmark says)")
    reproduce.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="default: all")
    reproduce.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="default: all")
    reproduce.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    reproduce.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="default: runs/reproduce")
    reproduce.add_argument("--share", metavar="I/N", help="every N-th run; a Slurm job array does this by itself")
    reproduce.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once, each with its GPU")
    reproduce.add_argument("--table", action="store_true", help="only print the table of what is done")
    reproduce.set_defaults(command=_reproduce)

    report = commands.add_parser("report", help="run folders as one HTML page that needs nothing else")
    report.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run folders, or folders of them")
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    report.set_defaults(command=_report)


def _train(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run)
    from snell_dist import log, run_folder  # after the check: what follows imports torch
    from snell_dist.job import run

    log.set_up()
    outcome = run(loaded, args.out, args.resume, args.folder)
    if outcome.interrupted and args.resume == "if any":
        tell_keeper(args, Exit.INTERRUPTED, "asked to stop")
        # After any other status torchrun starts its ranks again: wrong where the run was asked to stop, and right where
        # only the agent of another node died, for which it would else wait for minutes after the end of its own ranks.
        asked = args.folder is not None and (args.folder / run_folder.STOP).exists()
        return Exit.DONE if asked and dist.launched_by_torchrun() else Exit.INTERRUPTED
    if outcome.interrupted:
        again = ["snell", "train", args.config, *args.overrides]
        if outcome.folder is None:  # in the training of its base, which continues by itself
            again += ["--out", str(args.out), *(["--folder", str(args.folder)] if args.folder else [])]
        else:
            again += ["--resume", "--folder", str(outcome.folder)]
        log.info(f"interrupted and saved; continue with: {shlex.join(again)}")
        return Exit.INTERRUPTED
    if dist.rank() == 0:
        said = outcome.summary
        marked = " (chosen on these images, as the released code does)" if said["protocol"]["marked"] else ""
        print(f"test accuracy {said['test_accuracy']:.4f} on {said['test_images']} images{marked}  {outcome.folder}")
    return 0


def _keep(args: argparse.Namespace) -> int:
    from snell_dist.keep import keep

    return keep(args.run, args.started, args.attempts, args.grace, args.pause, args.silence)


def _stop(args: argparse.Namespace) -> int:
    from snell_dist.keep import stop

    print(stop(args.run, args.within))
    return Exit.DONE


def _status(args: argparse.Namespace) -> int:
    from snell_dist import status

    found = status.look(args.run)
    print(status.as_json(found) if args.json else status.text(found))
    return Exit.DONE


def _logs(args: argparse.Namespace) -> int:
    from snell_dist import status

    for message in status.lines(args.run, args.rank, args.follow):
        print(message, flush=args.follow)
    return Exit.DONE


def _eval(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run
    from snell_dist.run_folder import config_of

    folder = Path(args.config) if Path(args.config).is_dir() else None
    if args.data:
        return _eval_served(args)
    if folder and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no run folder, so say whose images it shall look at: --data CONFIG")
    loaded = load(str(config_of(folder)) if folder else args.config, args.overrides, Run)
    from snell_dist import log
    from snell_dist.job import measure

    log.set_up()
    found = measure(loaded, args.out, folder, args.split)
    if dist.rank() == 0:
        what = str(folder) if folder else f"the base of {args.config}"
        print(f"{args.split} accuracy {found['accuracy']:.4f} loss {found['loss']:.4f}  {what}")
    return 0


def _eval_served(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run
    from snell_dist.run_folder import config_of

    source = str(config_of(Path(args.data))) if Path(args.data).is_dir() else args.data
    loaded = load(source, args.overrides, Run)
    from snell_dist import log, predict

    log.set_up()
    found = predict.accuracy(Path(args.config), loaded, args.split)
    if dist.rank() == 0:
        print(f"{args.split} accuracy {found['accuracy']:.4f} loss {found['loss']:.4f}  {args.config}")
    return Exit.DONE


def _reproduce(args: argparse.Namespace) -> int:
    from snell_dist import log
    from snell_dist.benchmarks import matrix

    share = _share(args.share) or matrix.share_of_array() or (1, 1)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError(f"reproduce: --seeds {args.seeds} --jobs {args.jobs}: both must be at least 1")
    tasks, methods = ([word for word in words if "=" not in word] for words in (args.tasks, args.methods))
    overrides = [*args.overrides, *(word for word in (*args.tasks, *args.methods) if "=" in word)]  # written last
    wish = matrix.Wish(args.benchmark, args.data, tasks, methods, args.seeds, args.out, overrides, share)
    log.set_up()
    interrupted, status = False, 0
    if args.table:
        planned = matrix.plan(wish)
    elif args.jobs > 1:
        planned = matrix.plan(wish)
        matrix.check(planned)
        status = matrix.spawn(args.arguments, args.jobs)
        interrupted = status == Exit.INTERRUPTED
    else:
        planned, interrupted = matrix.run(wish)
    table = planned.table()
    print(table.markdown(), end="")
    if interrupted:
        log.info(f"interrupted and saved; continue with: {shlex.join(['snell', 'reproduce', *args.arguments])}")
        return Exit.INTERRUPTED
    return max(status, Exit.BAD_INPUT if any(result.failed for result in table.results) else 0)


def _share(said: str | None) -> tuple[int, int] | None:
    if said is None:
        return None
    first, _, step = said.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise UserError(f"--share {said}: expected I/N with I from 1 to N, such as 2/8")
    return int(first), int(step)


def _report(args: argparse.Namespace) -> int:
    from snell_dist import report

    count = report.write(args.folders, args.out)
    print(f"{args.out}: {count} runs, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0
