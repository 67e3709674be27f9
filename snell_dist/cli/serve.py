"""A finished model at work: what it says of pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from snell_dist.cli._common import Commands
from snell_dist.config import UserError
from snell_dist.exits import Exit


def add(commands: Commands) -> None:
    predicted = commands.add_parser(
        "predict",
        help="what a finished model says of pictures, as lines of JSON",
        description="Prints a line of JSON for each picture, in a stable order, as soon as it is known. A file that is"
        " no whole picture has an error in its line, and makes the exit status 2.",
    )
    predicted.add_argument("model", type=Path, metavar="MODEL", help="a run folder, or what snell export wrote")
    predicted.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (all below them), globs")
    predicted.add_argument("--top", type=int, default=5, metavar="K", help="the likeliest classes (default: 5)")
    predicted.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    predicted.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    predicted.set_defaults(command=_predict)


def _predict(args: argparse.Namespace) -> int:
    import json

    from snell_dist import predict

    if args.top < 1 or args.batch_size < 1:
        raise UserError(f"predict: --top {args.top} --batch-size {args.batch_size}: both must be at least 1")
    files = predict.find(args.images)
    status = Exit.DONE
    for row in predict.rows(predict.load(args.model, args.device), files, args.top, args.batch_size):
        print(json.dumps(row), flush=True)
        if "error" in row:
            status = Exit.BAD_INPUT
    return status
