"""The command `snell`. What its exit status says is in `exits`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from snell_dist import dist
from snell_dist.config import CONFIGS, ConfigError, UserError, trouble
from snell_dist.exits import Exit

SLURM_WORDS = "account", "qos", "constraint", "exclude", "job-name"
LAUNCH_VERBS = ("launch", "hosts"), ("launch", "lint")  # beside `launch CONFIG`
REPEATED_S = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; every mistake of the user is one line on standard error."""
    # What these write to the terminal by themselves is noise here; set the variables to hear it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    args = _parse(arguments)
    try:
        return args.command(args)
    except BrokenPipeError:  # `snell config show demo | head`
        sys.stdout = None
        return 0
    except UserError as error:
        _complain(error)
        if _tell_keeper(args, error.status, str(error)):
            dist.call_off()  # whoever keeps the run knows whether, and when, to try again
        return error.status
    except OSError as error:
        if error.filename is None:
            raise
        found = trouble(error.filename, error)
        _complain(found)
        _tell_keeper(args, found.status, str(found))
        return found.status
    except KeyboardInterrupt:
        print("snell: stopped", file=sys.stderr)
        return Exit.STOPPED


def _tell_keeper(args: argparse.Namespace, status: Exit, why: str) -> bool:
    """Launchers hide how a rank ended: whoever keeps the run learns it from the run folder. Whether anybody does."""
    if getattr(args, "resume", None) != "if any" or args.folder is None:
        return False
    from snell_dist.keep import leave_verdict

    leave_verdict(args.folder, status, why)
    return True


def _complain(error: UserError) -> None:
    """Of many ranks the first speaks first: where all fail alike, the launcher ends the others before they repeat."""
    rank = dist.rank()
    if rank:
        time.sleep(REPEATED_S)
    for line in str(error).splitlines():
        print(f"snell: [rank {rank}] {line}" if rank else f"snell: {line}", file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere after the configuration, between options too."""
    parser = _parser()
    said = list(arguments if arguments is not None else sys.argv[1:])
    if tuple(said[:2]) in LAUNCH_VERBS:
        said[:2] = [" ".join(said[:2])]
    cut = said.index("--") if "--" in said else len(said)
    args, rest = parser.parse_known_args(said[:cut])
    if said[cut:] and args.command is not _keep:
        parser.error(f"unrecognized arguments: {shlex.join(said[cut:])}")
    args.started = said[cut + 1 :]
    wrong = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    args.arguments = said[1:]  # after the command
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="snell", description="Fine-tune large vision models by SNELL.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a configuration", description="Train a configuration.")
    _takes_config(train)
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

    launch = commands.add_parser(
        "launch",
        help="the script that starts a configuration on many GPUs or nodes: written, or submitted; hosts, lint",
        description="Writes the script that starts a configuration by torchrun, DeepSpeed or Slurm, filled in, and says"
        " why so; with --submit, starts it.",
        epilog="also: snell launch hosts FILE [--check], is a hostfile right; snell launch lint FILE..., known traps of"
        " scripts",
    )
    _takes_config(launch)
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

    planned = commands.add_parser(
        "plan",
        help="will it fit: memory, traffic and cost of every engine and recomputation, before anything is launched",
        description="Predicts the memory of a configuration on GPUs that need not be there, and chooses how to train.",
    )
    _takes_config(planned)
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
    _takes_config(profiled)
    profiled.add_argument("--json", action="store_true", help="for machines")
    profiled.set_defaults(command=_profile)
    for remembers in (planned, profiled):
        remembers.add_argument(
            "--history", type=Path, default=Path("runs/memory.jsonl"), metavar="FILE", help="default: runs/memory.jsonl"
        )

    measure = commands.add_parser(
        "eval",
        help="accuracy of a base before training, or of a finished run",
        description="Accuracy and loss of a configuration's base as it is (zero-shot, for CLIP), or of a finished run.",
    )
    measure.add_argument("config", help="a configuration, or a run folder")
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

    data = commands.add_parser("data", help="is the data there and whole; record it; pack it into shards")
    verbs = data.add_subparsers(required=True, metavar="check|manifest|pack")
    checked = verbs.add_parser("check", help="what of VTAB-1k and FGVC a folder holds, and whether it is whole")
    checked.add_argument("folder", type=Path, metavar="DIR", help="the folder of the datasets, or a dataset's own")
    checked.add_argument("--quick", action="store_true", help="open only the images' headers")
    checked.add_argument("--json", action="store_true", help="for machines")
    checked.add_argument("--against", type=Path, metavar="FILE", help="compare with a manifest instead")
    checked.set_defaults(command=_data_check)
    manifest = verbs.add_parser("manifest", help="record counts and hashes of what is there")
    manifest.add_argument("folder", type=Path, metavar="DIR")
    manifest.add_argument("--out", type=Path, required=True, metavar="FILE")
    manifest.set_defaults(command=_data_manifest)
    packed = verbs.add_parser("pack", help="write a configuration's images into tar shards, for data.name=webdataset")
    _takes_config(packed)
    packed.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    packed.add_argument(
        "--shard-size", default="256MiB", metavar="SIZE", help="bytes, or a number of images (default: 256MiB)"
    )
    packed.set_defaults(command=_data_pack)

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

    backbones = commands.add_parser("backbones", help="the models that can be named, and what is in one")
    verbs = backbones.add_subparsers(required=True, metavar="ls|show")
    listed = verbs.add_parser("ls", help="families and sizes")
    listed.add_argument("pattern", nargs="?", default="*", help="a glob or a part of the name: clip, *-14, vit/base")
    listed.set_defaults(command=_backbones_ls)
    described = verbs.add_parser("show", help="blocks, targets, parameters, bytes, FLOPs; nothing is allocated")
    described.add_argument("name", help="family/size, such as clip/ViT-bigG-14")
    described.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as image_size=384")
    described.set_defaults(command=_backbones_show)

    methods = commands.add_parser("methods", help="how a model can be adapted")
    verbs = methods.add_subparsers(required=True, metavar="ls")
    listed = verbs.add_parser("ls", help="every method; with --backbone, what it trains there")
    listed.add_argument("--backbone", metavar="NAME", help="family/size, such as vit/base")
    listed.set_defaults(command=_methods_ls)

    config = commands.add_parser("config", help="list, show, copy and describe configurations")
    verbs = config.add_subparsers(required=True, metavar="ls|show|cp|schema")
    listed = verbs.add_parser("ls", help="the configurations that come with the package")
    listed.add_argument("pattern", nargs="?", default="*", help="a glob or a part of the name: vtab, *_snell32")
    listed.set_defaults(command=_config_ls)
    show = verbs.add_parser("show", help="a configuration, resolved: every key with its value")
    _takes_config(show)
    show.set_defaults(command=_config_show)
    copy = verbs.add_parser("cp", help="copy a shipped configuration, to change it")
    copy.add_argument("name")
    copy.add_argument("target", type=Path, nargs="?", default=Path("."), help="a file or a folder (default: here)")
    copy.set_defaults(command=_config_cp)
    verbs.add_parser("schema", help="the JSON schema, for editors").set_defaults(command=_config_schema)
    return parser


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or the name of a shipped configuration (snell config ls)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as method.rank=8")


def _train(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run)
    from snell_dist import log, run_folder  # after the check: what follows imports torch
    from snell_dist.job import run

    log.set_up()
    outcome = run(loaded, args.out, args.resume, args.folder)
    if outcome.interrupted and args.resume == "if any":
        _tell_keeper(args, Exit.INTERRUPTED, "asked to stop")
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


def _eval(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run
    from snell_dist.run_folder import config_of

    folder = Path(args.config) if Path(args.config).is_dir() else None
    loaded = load(str(config_of(folder)) if folder else args.config, args.overrides, Run)
    from snell_dist import log
    from snell_dist.job import measure

    log.set_up()
    found = measure(loaded, args.out, folder, args.split)
    if dist.rank() == 0:
        what = str(folder) if folder else f"the base of {args.config}"
        print(f"{args.split} accuracy {found['accuracy']:.4f} loss {found['loss']:.4f}  {what}")
    return 0


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


def _data_check(args: argparse.Namespace) -> int:
    from snell_dist.data_tools import check, manifest

    if args.against:
        different = manifest.differences(args.folder, args.against)
        print("\n".join(different) or f"{args.folder}: as in {args.against}")
        return Exit.BAD_INPUT if different else 0
    found, missing = check.look(args.folder, args.quick, contents=False)
    print(manifest.as_json(found, missing) if args.json else check.report(found, missing))
    return 0 if all(f.sound for f in found) else Exit.BAD_INPUT


def _data_manifest(args: argparse.Namespace) -> int:
    from snell_dist.data_tools import manifest

    found = manifest.write(args.folder, args.out)
    print(f"{args.out}: {len(found)} datasets")
    return 0


def _data_pack(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run)
    from snell_dist import log
    from snell_dist.data_tools.pack import Limit, pack

    log.set_up()
    try:
        index = pack(loaded.config.data, args.to, Limit.parse(args.shard_size))
    except ConfigError as error:
        raise loaded.locate(error) from None
    parts = [index.train, index.val, index.test]
    train, val, test = (sum(shard.samples for shard in part) for part in parts)
    print(f"{args.to}: {train} train, {val} val and {test} test images in {sum(map(len, parts))} shards")
    return 0


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


def _backbones_ls(args: argparse.Namespace) -> int:
    from fnmatch import fnmatch

    from snell_dist.config import Plugin, nearest

    plugin = Plugin("backbones")
    names = [f"{family}/{size}" for family in plugin.names() for size in plugin.find(family).sizes()]  # type: ignore[attr-defined]
    chosen = [name for name in names if fnmatch(name, args.pattern) or args.pattern in name]
    if not chosen:
        raise UserError(f"backbones ls: {args.pattern!r}: matches no model{nearest(args.pattern, names)}")
    print("\n".join(chosen))
    return 0


def _backbones_show(args: argparse.Namespace) -> int:
    from snell_dist import describe
    from snell_dist.backbones import section
    from snell_dist.config import settings

    print(describe.backbone(section(args.name, **settings(args.overrides))))
    return 0


def _methods_ls(args: argparse.Namespace) -> int:
    from snell_dist import describe
    from snell_dist.backbones import section

    print(describe.methods(section(args.backbone) if args.backbone else None))
    return 0


def _config_ls(args: argparse.Namespace) -> int:
    from fnmatch import fnmatch

    from snell_dist.config import nearest, shipped

    names = [name for name in shipped() if fnmatch(name, args.pattern) or args.pattern in name]
    if not names:
        raise UserError(f"config ls: {args.pattern!r}: matches no configuration{nearest(args.pattern, shipped())}")
    width = max(map(len, names))
    for name in names:
        about = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
        print(f"{name:{width}}  {about[1].removeprefix('# ') if len(about) > 1 else ''}".rstrip())
    return 0


def _config_show(args: argparse.Namespace) -> int:
    import yaml

    from snell_dist.config import load
    from snell_dist.run_config import Run

    print(yaml.safe_dump(load(args.config, args.overrides, Run).config.model_dump(), sort_keys=False), end="")
    return 0


def _config_cp(args: argparse.Namespace) -> int:
    from snell_dist.config import nearest, shipped

    if args.name not in shipped():
        raise UserError(f"config cp: {args.name!r}: no such shipped configuration{nearest(args.name, shipped())}")
    source = CONFIGS / f"{args.name}.yaml"
    target = args.target / source.name if args.target.is_dir() else args.target
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"config cp: {target}: exists and stays as it is; name another file") from None
    except OSError as error:
        raise UserError(f"config cp: {target}: cannot be written: {error.strerror}") from None
    print(target)
    return 0


def _config_schema(args: argparse.Namespace) -> int:
    import json

    from snell_dist.config import full_schema
    from snell_dist.run_config import Run

    print(json.dumps(full_schema(Run), indent=2))
    return 0


def _version() -> str:
    from snell_dist import __version__

    return f"snell {__version__}"


if __name__ == "__main__":
    sys.exit(main())
