"""Memory, predicted and measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from snell_dist import dist
from snell_dist.cli._common import Commands, takes_config
from snell_dist.config import ConfigError, UserError
from snell_dist.exits import Exit


def add(commands: Commands) -> None:
    planned = commands.add_parser(
        "plan",
        help="will it fit: memory, traffic and cost of every engine and recomputation, before anything is launched",
        description="Predicts the memory of a configuration on GPUs that need not be there, and chooses how to train.",
    )
    takes_config(planned)
    planned.add_argument("--gpus", type=int, required=True, metavar="N", help="in all")
    planned.add_argument("--nodes", type=int, default=1, metavar="M", help="that share them equally (default: 1)")
    planned.add_argument("--gpu", metavar="NAME", help="h100, rtx4090, t4, ...")
    planned.add_argument("--gpu-memory", metavar="SIZE", help="of each, such as 80GiB")
    planned.add_argument(
        "--overhead", action="append", default=[], metavar="NAME=SIZE", help="change an estimate of what only GPUs show"
    )
    planned.add_argument("--json", action="store_true", help="for machines")
    planned.set_defaults(command=_plan)

    profiled = commands.add_parser(
        "profile",
        help="the memory of a real step, beside what was predicted",
        description="Measures a step of a configuration here, with made-up images, and compares it with its prediction;"
        " under torchrun, of every rank. The errors are remembered, and `snell plan` cites them.",
    )
    takes_config(profiled)
    profiled.add_argument("--json", action="store_true", help="for machines")
    profiled.set_defaults(command=_profile)
    for remembers in (planned, profiled):
        remembers.add_argument(
            "--history", type=Path, default=Path("runs/memory.jsonl"), metavar="FILE", help="default: runs/memory.jsonl"
        )


def _plan(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.memory import gpus
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run, sweeping=True)
    if args.gpus < 1 or args.nodes < 1 or args.gpus % args.nodes:
        share = f"--gpus {args.gpus} --nodes {args.nodes}"
        raise UserError(
            f"{share}: must be GPUs, one at least, in equal number on every node, such as --gpus 8 --nodes 2"
        )
    gpu = gpus.find(args.gpu, args.gpu_memory)
    import json

    from snell_dist.memory import plan, profile, words
    from snell_dist.memory.overhead import Overhead

    overhead = Overhead().changed(args.overhead)
    try:
        made = plan.make(loaded.name, loaded.config, plan.Machine(args.gpus, args.nodes, gpu), overhead)
    except ConfigError as error:
        raise loaded.locate(error) from None
    if args.json:
        print(json.dumps(plan.as_json(made), indent=2))
    else:
        past = profile.past(args.history, loaded.config, "cuda")
        print(words.plan(made, loaded.config.data.class_count() is None, past))
    return Exit.DONE


def _profile(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run)
    import json

    from snell_dist import log, meeting
    from snell_dist.memory import profile, words

    log.set_up()
    try:
        device = dist.pick_device(loaded.config.train.device)
        with meeting.process_group(device):
            found = profile.profile(loaded.config, device)
            said = json.dumps(profile.as_json(found)) if args.json else words.profiled(found, loaded.name, dist.rank())
            for each in dist.gather_objects(said):
                if dist.rank() == 0:
                    print(each)
            if dist.rank() == 0:
                profile.remember(found, loaded.name, loaded.config, device, args.history)
            dist.barrier()
    except ConfigError as error:
        raise loaded.locate(error) from None
    return Exit.DONE
