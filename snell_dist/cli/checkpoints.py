"""Training checkpoints outside of their run."""

from __future__ import annotations

import argparse
from pathlib import Path

from snell_dist.cli._common import Commands
from snell_dist.exits import Exit


def add(commands: Commands) -> None:
    checkpoint = commands.add_parser("checkpoint", help="a run's training checkpoints: look, verify, export, convert")
    verbs = checkpoint.add_subparsers(required=True, metavar="ls|verify|export|convert")
    listed = verbs.add_parser("ls", help="what is there, and whole by its sizes (verify reads it all)")
    listed.add_argument("path", type=Path, metavar="RUN", help="a run folder, or one checkpoint")
    listed.add_argument("--json", action="store_true", help="for machines")
    listed.set_defaults(command=_checkpoint_ls)
    verified = verbs.add_parser("verify", help="hashes, every tensor, the optimizer's state; status 2 if damaged")
    verified.add_argument("path", type=Path, metavar="RUN", help="a run folder, or one checkpoint")
    verified.set_defaults(command=_checkpoint_verify)
    exported = verbs.add_parser("export", help="the adapter file of a run's newest whole checkpoint, or of one")
    exported.add_argument("path", type=Path, metavar="RUN", help="a run folder, or one checkpoint")
    exported.add_argument("--to", type=Path, required=True, metavar="FILE", help="a file that is not there yet")
    exported.add_argument("--ema", action="store_true", help="the moving average in place of the weights")
    exported.set_defaults(command=_checkpoint_export)
    converted = verbs.add_parser("convert", help="a DeepSpeed checkpoint (ZeRO 1, 2, 3), for backbone.weights")
    converted.add_argument("folder", type=Path, metavar="FOLDER", help="with `latest` and global_step<number>")
    converted.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    converted.add_argument(
        "--trust", action="store_true", help="its files are pickles, and reading them runs what is in them"
    )
    converted.set_defaults(command=_checkpoint_convert)


def _checkpoint_ls(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from snell_dist import checkpoint_tools

    found = checkpoint_tools.look(args.path)
    print(json.dumps(asdict(found), indent=1) if args.json else checkpoint_tools.listing(found))
    return 0


def _checkpoint_verify(args: argparse.Namespace) -> int:
    from snell_dist import checkpoint_tools

    whole = True
    for place in checkpoint_tools.places(args.path):
        verdict = checkpoint_tools.verify(place)
        print(verdict, flush=True)
        whole &= verdict.problem is None
    return 0 if whole else Exit.BAD_INPUT


def _checkpoint_export(args: argparse.Namespace) -> int:
    from snell_dist import checkpoint_tools, log

    log.set_up()
    source = checkpoint_tools.export(args.path, args.to, args.ema)
    what = "moving average" if args.ema else "weights"
    print(f"{args.to}: the {what} after step {source.meta.step} of {source.meta.steps}, from {source.path}")
    return 0


def _checkpoint_convert(args: argparse.Namespace) -> int:
    from snell_dist import checkpoint_tools

    made = checkpoint_tools.convert(args.folder, args.to, args.trust)
    print(f"{made.file}: {made.tensors} tensors; {made.layout}")
    return 0
