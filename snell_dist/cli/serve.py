"""A finished model at work: what it says of pictures; and on its way to others and back."""

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

    hub = commands.add_parser(
        "hub",
        help="what snell export wrote, to the Hugging Face hub and back",
        description="Uploads an exported folder, or fetches one; no other command but these goes online by itself.",
    )
    verbs = hub.add_subparsers(required=True, metavar="VERB")
    pushed = verbs.add_parser("push", help="upload an exported folder as one commit")
    pushed.add_argument("folder", type=Path, metavar="FOLDER", help="what snell export wrote")
    pushed.add_argument("repository", metavar="ORG/NAME", help="made if it is not there")
    pushed.add_argument("--private", action="store_true", help="where the repository is made")
    pushed.set_defaults(command=_push)
    pulled = verbs.add_parser("pull", help="fetch a repository's plain data into a new folder")
    pulled.add_argument("repository", metavar="ORG/NAME[@REVISION]", help="a branch, a tag or a commit; default: main")
    pulled.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    pulled.set_defaults(command=_pull)


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


def _push(args: argparse.Namespace) -> int:
    from snell_dist import hub

    made = hub.push(args.folder, args.repository, args.private)
    print(f"{made.url}: {made.bytes / 2**20:.1f} MiB, commit {made.commit}")
    return Exit.DONE


def _pull(args: argparse.Namespace) -> int:
    from snell_dist import hub

    got = hub.pull(args.repository, args.to)
    left = f"; not fetched: {', '.join(got.left)}" if got.left else ""
    print(f"{got.folder}: {got.bytes / 2**20:.1f} MiB, commit {got.commit}{left}")
    return Exit.DONE
