"""The command `snell`, one file a theme. What its exit status says is in `exits`.

A theme has `add(commands)`, which adds its commands to the parser; each names the function that carries it out.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence

from snell_dist import dist
from snell_dist.cli import catalogue, checkpoints, data, doctor, launch, memory, runs, serve, share
from snell_dist.cli._common import tell_keeper
from snell_dist.config import UserError, trouble
from snell_dist.exits import Exit

THEMES = runs, serve, share, launch, memory, data, checkpoints, doctor, catalogue  # as `snell --help` has them
LAUNCH_VERBS = ("launch", "hosts"), ("launch", "lint")  # beside `launch CONFIG`
REPEATED_S = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; every mistake of the user is one line on standard error."""
    # What these write to the terminal by themselves is noise here; set the variables to hear it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    args = _parse(arguments)
    try:
        return args.command(args)
    except BrokenPipeError:  # `snell config show demo | head`
        sys.stdout = None
        return 0
    except UserError as error:
        _complain(error)
        if tell_keeper(args, error.status, str(error)):
            dist.call_off()  # whoever keeps the run knows whether, and when, to try again
        return error.status
    except OSError as error:
        if error.filename is None:
            raise
        found = trouble(error.filename, error)
        _complain(found)
        tell_keeper(args, found.status, str(found))
        return found.status
    except KeyboardInterrupt:
        print("snell: stopped", file=sys.stderr)
        return Exit.STOPPED


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = argparse.ArgumentParser(prog="snell", description="Fine-tune large vision models by SNELL.")
    made.add_argument("--version", action="version", version=_version())
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for theme in THEMES:
        theme.add(commands)
    return made


def _complain(error: UserError) -> None:
    """Of many ranks the first speaks first: where all fail alike, the launcher ends the others before they repeat."""
    rank = dist.rank()
    if rank:
        time.sleep(REPEATED_S)
    for line in str(error).splitlines():
        print(f"snell: [rank {rank}] {line}" if rank else f"snell: {line}", file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere after the configuration, between options too."""
    made = parser()
    said = list(arguments if arguments is not None else sys.argv[1:])
    if tuple(said[:2]) in LAUNCH_VERBS:
        said[:2] = [" ".join(said[:2])]
    cut = said.index("--") if "--" in said else len(said)
    args, rest = made.parse_known_args(said[:cut])
    if said[cut:] and not hasattr(args, "attempts"):  # only `keep` takes a command
        made.error(f"unrecognized arguments: {shlex.join(said[cut:])}")
    args.started = said[cut + 1 :]
    wrong = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if wrong:
        made.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    args.arguments = said[1:]  # after the command
    return args


def _version() -> str:
    from snell_dist import __version__

    return f"snell {__version__}"
