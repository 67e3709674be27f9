"""Scripts that start training on many machines."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from snell_dist.cli._common import Commands, takes_config
from snell_dist.config import UserError
from snell_dist.exits import Exit

SLURM_WORDS = "account", "qos", "constraint", "exclude", "job-name"


def add(commands: Commands) -> None:
    launch = commands.add_parser(
        "launch",
        help="the script that starts a configuration on many GPUs or nodes: written, or submitted; hosts, lint",
        description="Writes the script that starts a configuration by torchrun, DeepSpeed or Slurm, filled in, and says"
        " why so; with --submit, starts it.",
        epilog="also: snell launch hosts FILE [--check], is a hostfile right; snell launch lint FILE..., known traps of"
        " scripts",
    )
    takes_config(launch)
    launch.add_argument("--via", choices=["torchrun", "deepspeed", "slurm"], required=True, help="what starts it")
    launch.add_argument("--submit", action="store_true", help="start it: by sbatch, or here")
    launch.add_argument("--to", type=Path, metavar="FILE", help="a script that is not there yet (default: print it)")
    launch.add_argument(
        "--run", metavar="FOLDER", help="the run folder (default: runs/NAME/<job id>, or torchrun, ...)"
    )
    launch.add_argument("--nodes", metavar="N", help="or LEAST:MOST, to go on with those that are left")
    launch.add_argument("--gpus-per-node", metavar="N", help="or KIND:N under Slurm, such as a100:4")
    launch.add_argument("--processes-per-node", type=int, metavar="N", help="default: one a GPU")
    launch.add_argument("--port", type=int, metavar="N", help="where the processes meet (default: one for each run)")
    launch.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="the machines, NAME slots=N a line; without Slurm"
    )
    slurm = launch.add_argument_group("with --via slurm")
    slurm.add_argument(
        "--kind", choices=["torchrun", "tasks", "deepspeed"], help="what srun starts (default: torchrun)"
    )
    slurm.add_argument("--container", metavar="IMAGE", help="a .sif by apptainer, any other by pyxis")
    slurm.add_argument("--cpus-per-gpu", type=int, metavar="N", help="cores a process (default: 8, or what there is)")
    slurm.add_argument("--time", metavar="TIME", help="of the job; the run requeues itself (default: 04:00:00)")
    slurm.add_argument("--partition", metavar="NAME", help="checked, as all of these, where sinfo can be asked")
    for name in SLURM_WORDS:
        slurm.add_argument(f"--{name}", metavar="WORD", help="as sbatch has it")
    launch.set_defaults(command=_launch)
    hosts = commands.add_parser(
        "launch hosts", description="Is a hostfile right; with --check, does ssh reach all of it."
    )
    hosts.add_argument("file", type=Path, metavar="HOSTFILE")
    hosts.add_argument("--check", action="store_true", help="by ssh, as DeepSpeed uses it; reads PDSH_SSH_ARGS_APPEND")
    hosts.add_argument("--ssh-port", type=int, metavar="N")
    hosts.add_argument("--timeout", type=int, default=10, metavar="SECONDS", help="of one machine (default: 10)")
    hosts.set_defaults(command=_launch_hosts)
    lint = commands.add_parser(
        "launch lint", description="Finds the known traps in scripts; status 2 where one is an error."
    )
    lint.add_argument("files", nargs="*", type=Path, metavar="FILE", help="scripts for sbatch or for bash")
    lint.add_argument("--rules", action="store_true", help="what is looked for, and why")
    lint.set_defaults(command=_launch_lint)


def _launch(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.launch import plan, render, submit
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run)
    same = (
        "via", "kind", "nodes", "gpus_per_node", "processes_per_node", "cpus_per_gpu", "time", "partition", "container",
        "hostfile", "port", "run",
    )  # fmt: skip
    options = {word: getattr(args, word.replace("-", "_")) for word in SLURM_WORDS}
    wish = plan.Wish(options=options, **{name: getattr(args, name) for name in same})
    planned = plan.make(loaded, args.config, args.overrides, wish)
    if args.submit:
        submit.check(planned)
    script = render.render(planned, shlex.join(["snell", "launch", *args.arguments]))
    print(planned.text(), file=sys.stderr)
    if args.to is not None:
        submit.write(script, args.to)
    elif not args.submit:
        print(script, end="")
    if args.submit:
        print(submit.submit(planned, script, args.to))
    elif args.to is not None:
        print(f"{args.to}: start it with: {submit.how(planned, args.to)}")
    return Exit.DONE


def _launch_hosts(args: argparse.Namespace) -> int:
    from snell_dist.launch import hosts

    found = hosts.read(args.file)
    if args.check:
        lost = hosts.unreachable(found, args.ssh_port, args.timeout)
        if lost:
            raise UserError("\n".join(f"{args.file}: {line}" for line in lost))
    reached = ", all reached by ssh" if args.check else ""
    print(f"{args.file}: {sum(host.slots for host in found)} processes on {len(found)} machine(s){reached}")
    return Exit.DONE


def _launch_lint(args: argparse.Namespace) -> int:
    from snell_dist.launch import lint

    if args.rules:
        for rule in lint.RULES:
            print(f"{rule.id} ({rule.severity}): {rule.about}\n    {rule.why}\n    mend: {rule.mend}")
        return Exit.DONE
    if not args.files:
        raise UserError("launch lint: name the scripts to look at, or say --rules")
    errors = False
    for file in args.files:
        try:
            found = lint.lint(file.read_text(encoding="utf-8"), str(file))
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not a text") from None
        print(lint.report(found, str(file)))
        errors |= any(finding.severity == "error" for finding in found)
    return Exit.BAD_INPUT if errors else Exit.DONE
