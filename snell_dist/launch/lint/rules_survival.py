"""Traps that show when something happens: the time limit, a preemption, a dead rank, a lost node."""

from __future__ import annotations

import re
from collections.abc import Iterator

from snell_dist.launch.lint.options import SIGNALS
from snell_dist.launch.lint.rule import ERROR, WARNING, Found, rule
from snell_dist.launch.lint.script import SPREADS, Launch, Script, Step
from snell_dist.launch.lint.shell import shown

LONG_S = 3600  # a job up to an hour may well begin anew
LEAST_GRACE_S = 60
SHUTDOWN_S = 30  # torchrun's own --shutdown-timeout
OUTPUT = r"(out|save|ckpt|checkpoint|run|exp|root)[\w.-]*"


def traps(script: Script, signal: str) -> Iterator[Step]:
    """Where the batch shell is told to do something on a signal."""
    for step in script.steps:
        if step.words[0] == "trap" and step.place == "batch" and len(step.words) > 2 and step.words[1] not in ("-", ""):
            names = {SIGNALS.get(w, w.upper().removeprefix("SIG")) for w in step.words[2:]}
            if signal in names:
                yield step


def _executed(launch: Launch) -> bool:
    return launch.step.words[0] == "exec"


@rule(
    "no-requeue",
    WARNING,
    about="nothing starts the job again",
    why="after a preemption or a lost node the job is gone, unless the site happens to requeue by default",
    mend="#SBATCH --requeue, with a program that resumes; or #SBATCH --no-requeue to say that it is meant",
)
def no_requeue(script: Script) -> Found:
    said = script.asked("requeue") is not None or script.asked("no-requeue") is not None
    chained = script.has(r"\bscontrol\s+requeue\b|\bsbatch\b") or script.asked("dependency") is not None
    if script.launches and (script.time_s or 0) > LONG_S and not said and not chained:
        yield script.line_of("time"), f"--time={script.asked('time')} without --requeue"


@rule(
    "no-signal",
    WARNING,
    about="nothing warns the program before the time limit",
    why="at the limit comes SIGTERM, half a minute later SIGKILL: what was trained since the last checkpoint is lost",
    mend="#SBATCH --signal=B:USR1@300 under `snell keep`; or --signal=TERM@300 for a program that saves on SIGTERM",
)
def no_signal(script: Script) -> Found:
    watched = script.asked("signal") is not None or script.has(r"\btimeout\b")
    if script.launches and (script.time_s or 0) > LONG_S and not watched:
        yield script.line_of("time"), f"--time={script.asked('time')} without --signal"


@rule(
    "signal-untrapped",
    ERROR,
    about="the batch shell gets a signal that it does not await",
    why="--signal=B: reaches the batch shell alone, and kills it: the job ends early and unsaved",
    mend="a trap in the script, or `exec snell keep RUN -- srun ...`, which awaits SIGUSR1 and SIGTERM",
)
def signal_untrapped(script: Script) -> Found:
    if script.signal and script.signal[1] and script.launches and not script.kept:
        name = script.signal[0]
        if not any(traps(script, name)) and not any(map(_executed, script.launches)):
            yield script.line_of("signal"), f"--signal={script.asked('signal')} without a trap of {name}"


@rule(
    "trap-never-signalled",
    ERROR,
    about="the batch shell awaits a signal that it will not get",
    why="--signal without B: goes to the job's steps (what srun starts), not to the batch shell: the trap never runs",
    mend="#SBATCH --signal=B:USR1@300",
)
def trap_never_signalled(script: Script) -> Found:
    if script.signal and not script.signal[1]:
        for step in traps(script, script.signal[0]):
            yield step.line, f"a trap of {script.signal[0]}, and --signal={script.asked('signal')}"


@rule(
    "signal-reaches-nobody",
    ERROR,
    about="the signal before the limit reaches nobody",
    why="--signal without B: goes to what srun starts; a command that the batch shell starts itself is no step",
    mend="start it by srun; or #SBATCH --signal=B:USR1@300 with `exec` before the command",
)
def signal_reaches_nobody(script: Script) -> Found:
    signal = script.signal
    awaited = script.kept or script.has(SPREADS.pattern) or (signal and any(traps(script, signal[0])))
    if signal and not signal[1] and script.launches and not awaited:
        yield script.line_of("signal"), f"--signal={script.asked('signal')}, and no srun"


@rule(
    "trap-in-foreground",
    ERROR,
    about="a trap that waits for the training to end",
    why="bash runs a trap only after the command in the foreground has ended: here, when it is too late",
    mend="srun ... & wait $!; wait $!   or `exec snell keep RUN -- srun ...`",
)
def trap_in_foreground(script: Script) -> Found:
    if not script.signal or not script.signal[1]:
        return
    set_at = min((step.line for step in traps(script, script.signal[0])), default=None)
    for launch in script.launches:
        free = launch.step.command.background or _executed(launch) or launch.step.kept
        if set_at is not None and launch.line > set_at and not free:
            yield launch.line, f"the trap of line {set_at} waits for this command"


@rule(
    "background-without-wait",
    ERROR,
    about="training in the background, and nobody waits for it",
    why="Slurm ends the job, and everything in it, when the batch script ends",
    mend="wait, at the end",
)
def background_without_wait(script: Script) -> Found:
    if not script.batch or script.has(r"\b(wait|while|until|fg|jobs)\b|tail\s.*--pid"):
        return
    for launch in script.launches[-1:]:
        if launch.step.command.background:
            yield launch.line, f"{launch.kind} ... & without wait"


@rule(
    "wait-once",
    ERROR,
    about="the script ends as soon as the trap has run",
    why="a signal ends `wait` at once; behind it the script ends, and with it the job, while the training still saves",
    mend="wait a second time after the trap: wait $PID; wait $PID",
)
def wait_once(script: Script) -> Found:
    if not script.signal or not script.signal[1] or script.has(r"\bscontrol\s+requeue\b|\bsbatch\b"):
        return
    waits = list(script.find(r"\bwait\b"))
    started = any(launch.step.command.background for launch in script.launches)
    looped = script.has(r"\b(while|until|for)\b")
    if started and len(waits) == 1 and not looped and any(traps(script, script.signal[0])):
        yield waits[0][0], "one wait, which the signal ends"


@rule(
    "signal-kills-agent",
    ERROR,
    about="a signal that torchrun does not know",
    why="SIGUSR1 and SIGUSR2 end torchrun at once and leave its workers running, unsaved, until Slurm kills them",
    mend="torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1, which passes it on",
)
def signal_kills_agent(script: Script) -> Found:
    if not script.signal:
        return
    name, only_shell, _ = script.signal
    passed_on = script.has(rf"\bkill\s+(-s\s+|-)(SIG)?{name}\b|scancel\b.*{name}") and not script.has(
        r"\bpgrep\b|\bpkill\b"
    )
    for launch in script.of("torchrun"):
        reached = passed_on if only_shell else launch.srun is not None
        known = {w.upper().removeprefix("SIG") for w in launch.options.get("signals-to-handle", "").split(",")}
        if name in ("USR1", "USR2") and reached and name not in known and "?" not in launch.options:
            yield launch.line, f"torchrun gets SIG{name} without --signals-to-handle"


@rule(
    "short-grace",
    WARNING,
    about="little time between the signal and the limit",
    why="a step must end first, and all ranks of a large model write at once to a file system that others use",
    mend="--signal=...@300, or thrice what a save takes",
)
def short_grace(script: Script) -> Found:
    if script.signal and script.signal[2] < LEAST_GRACE_S:
        yield script.line_of("signal"), f"{script.signal[2]} s before the limit"


@rule(
    "shutdown-timeout",
    WARNING,
    about="torchrun's patience does not fit the grace of --signal",
    why="torchrun passes the signal on and kills its workers after --shutdown-timeout (30 s where not given)",
    mend="--shutdown-timeout equal to the seconds of --signal",
)
def shutdown_timeout(script: Script) -> Found:
    if not script.signal or script.says("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        return
    name, _, grace = script.signal
    for launch in script.of("torchrun"):
        given = launch.options.get("shutdown-timeout")
        if given is None and (name == "TERM" or name in launch.options.get("signals-to-handle", "")):
            given = str(SHUTDOWN_S)
        said = script.number(given or "")
        if said and not grace / 2 <= said <= grace and "?" not in launch.options:
            yield launch.line, f"{said} s of --shutdown-timeout, {grace} s of --signal"


@rule(
    "restart-store",
    ERROR,
    about="torchrun's restarts hang",
    why="the second attempt reads stale addresses of the first from the launcher's store (pytorch#135712)",
    mend="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
)
def restart_store(script: Script) -> Found:
    if script.says("TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        return
    for launch in script.of("torchrun"):
        if (script.number(launch.options.get("max-restarts", "")) or 0) > 0:
            yield launch.line, f"--max-restarts={script.number(launch.options['max-restarts'])} with a shared store"


@rule(
    "requeue-unbounded",
    WARNING,
    about="a job that requeues itself for ever",
    why="a run that fails at once comes back at once, as long as the account has hours",
    mend='count: [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ] && scontrol requeue ...; `snell keep` stops without progress',
)
def requeue_unbounded(script: Script) -> Found:
    if script.has(r"(?i)restart_count|attempt|tries|max_|restarts"):
        return
    for line, match in script.find(r"\bscontrol\s+requeue\b"):
        on_status = re.search(r"==\s*\d|-eq\s+\d", "".join(script.lines[max(line - 2, 0) : line]))  # its own, for this
        if not on_status:
            yield line, f"{match[0]} without a bound"


@rule(
    "run-folder-by-date",
    WARNING,
    about="the run's folder is named by the time of the start",
    why="a requeued job makes another folder, finds no checkpoint there, and begins anew",
    mend="name it by $SLURM_JOB_ID, which stays the same when the job is requeued",
)
def run_folder_by_date(script: Script) -> Found:
    for launch in script.launches:
        text = launch.step.text
        if script.requeues and re.search(rf"\b{OUTPUT}[= ]\S*?[$\ue001]\(\s*date\b", text, re.IGNORECASE):
            dated = next(
                (a.line for a in script.assignments if re.search(r"\(\s*date\b", a.value) and a.value in text), None
            )
            yield dated or launch.line, "$(date ...) in the name of the folder"


@rule(
    "node-local-checkpoints",
    WARNING,
    about="checkpoints on a disk that only one node sees",
    why="other nodes, and the next attempt on other nodes, find nothing there; much of it is wiped when the job ends",
    mend="a folder on the shared file system",
)
def node_local_checkpoints(script: Script) -> Found:
    if not (script.several or script.requeues) or script.has(r"\b(rsync|cp|mv|tar|sbcast|aws|gsutil)\b"):
        return
    local = rf"\b({OUTPUT})[= ]([$\ue001]\{{?(?:SLURM_)?TMPDIR\b\S*|(?:/var)?/tmp\b\S*|/dev/shm\S*)"
    for launch in script.launches:
        for match in re.finditer(local, launch.step.text, re.IGNORECASE):
            yield script.origin(match[0], launch.line), f"{match[1]} is {shown(match[3])}"


@rule(
    "no-kill-on-bad-exit",
    WARNING,
    about="a dead rank leaves the others waiting",
    why="srun waits for all tasks: the survivors hang in a collective until their own time-out, or the job's limit",
    mend="srun --kill-on-bad-exit=1",
)
def no_kill_on_bad_exit(script: Script) -> Found:
    if script.says("SLURM_KILL_BAD_EXIT"):
        return
    for launch in script.launches:
        known = {"kill-on-bad-exit", "?"} & set(launch.srun or {})
        if script.many(launch) and not known:
            yield launch.line, f"srun of {script.total(launch.srun)} tasks without --kill-on-bad-exit"
