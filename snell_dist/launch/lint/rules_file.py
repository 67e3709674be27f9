"""Traps in the file itself: what sbatch reads of it, where its output goes, what becomes of its exit status."""

from __future__ import annotations

import re

from snell_dist.config import nearest
from snell_dist.launch.lint.rule import ALL, ERROR, WARNING, Found, rule
from snell_dist.launch.lint.script import Script

GRAVE = r"nodes|n?tasks|gpus|gres|signal|requeue|open-mode|array"  # options whose lack is seen late


@rule(
    "no-shebang",
    ERROR,
    about="the first line does not name the shell",
    why="sbatch refuses a script whose first line does not begin with #!",
    mend="begin the file with #!/usr/bin/env bash",
)
def no_shebang(script: Script) -> Found:
    if script.batch and not script.text.startswith("#!"):
        yield 1, f"the first line is {script.lines[0][:40]!r}"


@rule(
    "dos-line-endings",
    ERROR,
    about="lines end as on Windows",
    why="sbatch refuses them, and a shell takes the carriage return for a part of the last word",
    mend="dos2unix FILE, or sed -i 's/\\r$//' FILE",
)
def dos_line_endings(script: Script) -> Found:
    if "\r\n" in script.text:
        yield script.text[: script.text.index("\r\n")].count("\n") + 1, "a carriage return before the line's end"


@rule(
    "late-directive",
    ERROR,
    about="#SBATCH after the first command",
    why="sbatch stops looking at the first line that is neither empty nor a comment: what follows is silently ignored",
    mend="move all #SBATCH lines above the first command, `set -e` included",
)
def late_directive(script: Script) -> Found:
    for directive in script.late:
        yield directive.line, f"#SBATCH {directive.written} is ignored"


@rule(
    "unread-directive",
    WARNING,
    about="a line that looks like a directive but is a comment",
    why="only a line that begins with #SBATCH, without a blank before or within, counts; the option is not in force",
    mend="write #SBATCH at the line's beginning, or delete the line",
)
def unread_directive(script: Script) -> Found:
    active = {directive.name for directive in script.directives}
    for line, written, name in script.unread:
        aside = written.startswith("##") and not re.match(GRAVE, name)
        if name not in active and not aside:  # otherwise an alternative that was put aside
            yield line, f"`{written}` with --{name} is only a comment"


@rule(
    "short-with-equals",
    ERROR,
    about="a one-letter option of #SBATCH followed by =",
    why="the sign becomes a part of the value: -J=run names the job '=run'",
    mend="write -J run, -Jrun or --job-name=run",
)
def short_with_equals(script: Script) -> Found:
    for directive in script.directives:
        if match := re.search(r"(?:^|\s)(-[A-Za-z])=", directive.written):
            yield directive.line, f"{match[1]}= in a directive"


@rule(
    "variable-in-directive",
    ERROR,
    about="a shell variable or ~ in #SBATCH",
    why="no shell reads these lines: the sign is taken as it stands, into a folder of that name",
    mend="write the path in full, use %x, %j, %u of sbatch, or give the option to sbatch on the command line",
)
def variable_in_directive(script: Script) -> Found:
    for directive in script.directives:
        if re.search(r"\$[A-Za-z_{(]|`", directive.value) or re.match(r"~(/|$)", directive.value):
            yield directive.line, f"--{directive.name}={directive.value} is not expanded"


@rule(
    "output-without-id",
    WARNING,
    about="the log's name is the same for all jobs, or for all tasks of an array",
    why="two jobs, or an array's tasks, write over each other's log",
    mend="put %j into the name (in an array %A_%a), or leave the option out: slurm-%j.out",
)
def output_without_id(script: Script) -> Found:
    enough = r"%\d*[jJ]|%\d*A.*%\d*a|%\d*a.*%\d*A" if script.asked("array") else r"%\d*[jJA]"
    for directive in script.directives:
        alone = directive.name in ("output", "error") and directive.value not in ("", "/dev/null", "none")
        if alone and not re.search(enough, directive.value):
            yield directive.line, f"--{directive.name}={directive.value}"


@rule(
    "output-folder-too-late",
    ERROR,
    about="the script makes the folder that its own log is in",
    why="Slurm opens the log before the script runs: where the folder is missing the job fails without a word",
    mend="make the folder before sbatch, and delete the line here",
)
def output_folder_too_late(script: Script) -> Found:
    wanted = (script.asked("output") or "").rpartition("/")[0]
    for step in script.steps:
        if step.words[0] == "mkdir" and wanted and wanted in (word.rstrip("/") for word in step.words[1:]):
            yield step.line, f"mkdir {wanted}, the folder of --output"


@rule(
    "no-append",
    WARNING,
    about="a job that may be requeued begins its log anew each time",
    why="sbatch empties the log of the earlier attempt, which says why it ended",
    mend="#SBATCH --open-mode=append",
)
def no_append(script: Script) -> Found:
    if script.batch and script.requeues and (script.asked("open-mode") or "truncate").startswith("t"):
        yield script.line_of("open-mode", "requeue", "output"), "requeued without --open-mode=append"


@rule(
    "script-folder",
    ERROR,
    about="files are looked for beside the script",
    why="sbatch runs a copy in its spool folder: $0 and BASH_SOURCE lead to /var/spool/slurmd/job.../slurm_script",
    mend='use "$SLURM_SUBMIT_DIR", the folder from which sbatch was called, or a path in full',
)
def script_folder(script: Script) -> Found:
    if not script.directives or script.has(r"scontrol\s+show\s+job"):
        return
    place = r"(?:dirname|realpath|readlink)\b[^|;)]*?\$\{?(?:0\b|BASH_SOURCE)|\$\{(?:0|BASH_SOURCE\S*?)%/\*\}"
    for line, match in script.find(place):
        if "SLURM" not in script.lines[line - 1]:
            yield line, match[0]


@rule(
    "hidden-failure",
    WARNING,
    about="training is piped into a command that always succeeds",
    why="a pipeline's status is that of its last command: with tee, a crash is reported as COMPLETED",
    mend="set -o pipefail, or let --output keep the log",
)
def hidden_failure(script: Script) -> Found:
    if not script.batch or script.has(r"pipefail|PIPESTATUS") or "pipefail" in script.lines[0]:
        return
    for launch in script.launches:
        if launch.step.command.after == "|":
            yield launch.line, f"{launch.kind} ... | without pipefail"


@rule(
    "lost-status",
    WARNING,
    about="what follows the training decides the job's exit status",
    why="a script's status is that of its last command: a crash is reported as COMPLETED",
    mend="set -e at the top, or let the training be the last command",
)
def lost_status(script: Script) -> Found:
    watched = r"\$\?|\bset\s+-[a-z]*e|errexit|\bexit\s|\bwait\b|^\s*(function\s+)?[\w-]+\s*\(\)"
    if not script.batch or not script.launches or script.has(watched) or re.match(r"#!.*sh\s+-\w*e", script.text):
        return
    launch, after = script.launches[-1], script.steps[-1]
    command = launch.step.command
    guarded = command.after in ("&&", "||", "|", "&") or command.before in ("if", "while", "until", "!", "&&", "||")
    if after.line > launch.line and not guarded and not command.background and not launch.step.kept:
        yield after.line, f"`{' '.join(after.words)[:50]}` ends the script, not the training of line {launch.line}"


@rule(
    "conda-activate",
    ERROR,
    about="conda activate in a shell that conda is not set up for",
    why="a batch script's shell reads no .bashrc: 'CondaError: Run conda init before conda activate'",
    mend='source "$(conda info --base)/etc/profile.d/conda.sh" first, or call the environment\'s python by its path',
)
def conda_activate(script: Script) -> Found:
    if re.match(r"#!.*\s-\w*[li]", script.text):
        return
    for step in script.steps:
        if step.words[0] in ("source", ".", "eval", "module", "ml"):
            return
        if step.words[:2] == ("conda", "activate"):
            yield step.line, "conda activate without conda.sh"
            return


@rule(
    "unknown-rule",
    WARNING,
    about="a comment allows a rule that does not exist",
    why="it silences nothing",
    mend="see snell launch lint --rules",
)
def unknown_rule(script: Script) -> Found:
    for name, line in script.allowed.items():
        if name not in ALL:
            yield line, f"allow {name}: no such rule{nearest(name, ALL)}"
