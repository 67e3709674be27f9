"""What the themes share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from snell_dist.exits import Exit

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or the name of a shipped configuration (snell config ls)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as method.rank=8")


def tell_keeper(args: argparse.Namespace, status: Exit, why: str) -> bool:
    """Launchers hide how a rank ended: whoever keeps the run learns it from the run folder. Whether anybody does."""
    if getattr(args, "resume", None) != "if any" or args.folder is None:
        return False
    from snell_dist.keep import leave_verdict

    leave_verdict(args.folder, status, why)
    return True
