"""A launch script as the rules see it: directives, commands, variables, and who starts the training how."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from snell_dist.launch.lint import shell
from snell_dist.launch.lint.options import (
    BARE,
    FLAGS,
    SHORT,
    SIGNALS,
    Directive,
    counted,
    directives,
    evaluate,
    options,
    seconds,
    whole,
)
from snell_dist.launch.lint.shell import ASSIGNMENT, Command

LAUNCHER_FLAGS = re.compile(  # of torchrun, accelerate and deepspeed, that take no word after them
    r"standalone|no-python|run-path|use-env|virtual-local-rank|module|multi-gpu|use-deepspeed|use-fsdp|cpu|debug"
    r"|quiet|no-ssh|no-ssh-check|force-multi|no-local-rank|bind-cores-to-rank"
)
DEFAULT = re.compile(rf"^[${shell.EARLIER}]\{{\w+:?-(\S*\b(?:python[\d.]*|torchrun|deepspeed|accelerate|bash))\}}$")
SHELLS = "bash", "sh", "zsh"
DECLARE = {"export", "declare", "local", "typeset", "readonly"}
TALK = re.compile(  # commands that speak of others, or look after them
    r":|echo|printf|module|ml|pip|mamba|which|command|type|source|\.|cd|mkdir|ls|cat|cp|rsync|git|\[|\[\[|test"
    r"|grep|sed|awk|sbatch|scancel|alias|for|trap|pkill|pgrep|kill|rm|touch|tee|set|unset|shift|logger|ssh|pdsh"
    r"|clush"
)
ALLOW = re.compile(r"#\s*snell:\s*allow\s+(.*)")
LONGEST = 20_000  # characters of a variable's value
ELSEWHERE = re.compile(r"\b(mpirun|mpiexec|pdsh|clush|parallel-ssh|ssh|ray)\b")
SPREADS = re.compile(r"\b(srun|mpirun|mpiexec|pdsh|clush|parallel-ssh|ssh|ray)\b")  # all that reach other nodes
NO_TRAINING = {"pip", "venv", "json.tool", "compileall", "http.server", "zipfile", "site"}


@dataclass(frozen=True)
class Assignment:
    """`place`: who runs it, the "batch" shell or each "task"; the value is unquoted, its variables filled in."""

    line: int
    name: str
    value: str
    place: str


@dataclass(frozen=True)
class Around:
    """Where commands stand: which shell reads them, and what it runs under; as in Step."""

    place: str
    srun: Mapping[str, str] | None
    kept: bool


@dataclass(frozen=True)
class Step:
    """A command as it is run, words unquoted and filled in.

    `place`: the shell that reads it, "batch" or "task"; `srun`: options of the srun it runs under, if any;
    `kept`: it is under `snell keep`.
    """

    command: Command
    words: tuple[str, ...]
    place: str
    srun: Mapping[str, str] | None
    kept: bool

    @property
    def line(self) -> int:
        return self.command.line

    @cached_property
    def text(self) -> str:
        return " ".join(self.words)

    def early(self, text: str, name: str) -> bool:
        """The batch shell has put a variable's value into the text, the same for all tasks."""
        return re.search(rf"[{'$' if self.place == 'batch' else ''}{shell.EARLIER}]\{{?({name})\b", text) is not None


@dataclass(frozen=True)
class Launch:
    """What starts training. `kind`: torchrun, deepspeed, accelerate, python, snell. Options' names have dashes."""

    line: int
    kind: str
    options: Mapping[str, str]
    step: Step

    @property
    def srun(self) -> Mapping[str, str] | None:
        return self.step.srun

    @property
    def elastic(self) -> bool:
        """Starts the processes of a node by torch's launcher."""
        return self.kind in ("torchrun", "accelerate")


@dataclass
class Script:
    text: str
    name: str
    directives: list[Directive] = field(default_factory=list)
    unread: list[tuple[int, str, str]] = field(default_factory=list)  # line, how it is written, name of the option
    late: list[Directive] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    exported: set[str] = field(default_factory=set)
    files: dict[str, shell.Heredoc] = field(default_factory=dict)  # that the script writes

    def __post_init__(self) -> None:
        found = shell.commands(self.code)
        written = {
            line
            for command in found
            if command.heredoc
            for line in range(command.heredoc.line, command.heredoc.line + command.heredoc.text.count("\n"))
        }
        self._read_directives(written)
        self._read_commands(found, Around("batch", None, False), {})

    # The text.

    @cached_property
    def code(self) -> str:
        return self.text.replace("\r\n", "\n")

    @cached_property
    def lines(self) -> list[str]:
        return self.code.split("\n")

    @cached_property
    def allowed(self) -> dict[str, int]:
        """Rules that a comment silences, and its line."""
        found = ((number, ALLOW.search(line)) for number, line in enumerate(self.lines, 1))
        return {rule: number for number, match in found if match for rule in re.split(r"[,\s]+", match[1].strip())}

    @cached_property
    def bare(self) -> list[tuple[int, str]]:
        """Lines that are no comments, with their numbers."""
        return [(n, line) for n, line in enumerate(self.lines, 1) if not line.lstrip().startswith("#")]

    def find(self, pattern: str) -> Iterator[tuple[int, re.Match[str]]]:
        for number, line in self.bare:
            for match in re.finditer(pattern, line):
                yield number, match

    def has(self, pattern: str) -> bool:
        return any(True for _ in self.find(pattern))

    @property
    def batch(self) -> bool:
        """Is for sbatch."""
        return bool(self.directives or self.late or self.unread) or self.name.endswith((".sbatch", ".slurm"))

    # What Slurm is asked for; None: that is not said here.

    def asked(self, name: str) -> str | None:
        return next((d.value for d in reversed(self.directives) if d.name == name), None)

    def line_of(self, *names: str) -> int | None:
        return next((d.line for d in reversed(self.directives) if d.name in names), None)

    @cached_property
    def nodes(self) -> int | None:
        """The least number of nodes."""
        said = re.match(r"\d+", self.asked("nodes") or "")
        if said:
            return int(said[0])
        total, each = whole(self.asked("ntasks")), whole(self.asked("ntasks-per-node"))
        return -(-total // each) if total and each else None

    @property
    def fixed_nodes(self) -> int | None:
        """The number of nodes where it is one number."""
        return None if re.search(r"[-,:]", self.asked("nodes") or "") else self.nodes

    @property
    def several(self) -> bool:
        return (self.nodes or 1) > 1

    @cached_property
    def gpus(self) -> int | None:
        """Of each node."""
        if self.asked("gpus-per-node"):
            return counted(self.asked("gpus-per-node"))
        found = re.search(r"\bgpu(?::[\w.-]*[A-Za-z][\w.-]*)?(?::(\d+))?(?=$|[,(])", self.asked("gres") or "")
        if found:
            return int(found[1] or 1)
        each, tasks = counted(self.asked("gpus-per-task")), self.tasks()
        if each and tasks:
            return each * tasks
        total = counted(self.asked("gpus"))
        return total // self.nodes if total and self.fixed_nodes and self.nodes and total % self.nodes == 0 else None

    @property
    def wants_gpus(self) -> bool:
        said = "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"
        return any(self.asked(name) for name in said) or "gpu" in (self.asked("gres") or "")

    def tasks(self, srun: Mapping[str, str] | None = None) -> int | None:
        """Of each node, under this srun."""
        own = srun or {}
        if "ntasks-per-node" in own:
            return self.number(own["ntasks-per-node"])
        nodes = self.number(own["nodes"]) if "nodes" in own else self.fixed_nodes
        if "ntasks" in own:
            total = self.number(own["ntasks"])
            return -(-total // nodes) if total and nodes else None
        if self.asked("ntasks-per-node"):
            return whole(self.asked("ntasks-per-node"))
        if self.asked("ntasks-per-gpu") or self.asked("ntasks-per-socket"):
            return None
        if self.asked("ntasks"):
            total = whole(self.asked("ntasks"))
            return -(-total // nodes) if total and nodes else total if total == 1 else None
        return 1 if self.directives else None

    def total(self, srun: Mapping[str, str] | None = None) -> int | None:
        """Tasks on all nodes, under this srun."""
        own = srun or {}
        if "ntasks" in own:
            return self.number(own["ntasks"])
        nodes = self.number(own["nodes"]) if "nodes" in own else self.fixed_nodes
        each = self.tasks(srun)
        if ("nodes" in own and nodes is None) or ("nodelist" in own and "nodes" not in own):
            return None
        if nodes is None and each and not self.asked("nodes") and self.asked("ntasks"):
            return whole(self.asked("ntasks"))
        return each * (nodes or 1) if each and (nodes or not self.asked("nodes")) else None

    @cached_property
    def time_s(self) -> int | None:
        """The time limit."""
        return seconds(self.asked("time") or "")

    @cached_property
    def signal(self) -> tuple[str, bool, int] | None:
        """Its name without SIG, whether only the batch shell gets it, and how many seconds before the limit."""
        said = re.fullmatch(r"(?:([BR]+):)?(?:SIG)?(\w+)(?:@(\d+))?", self.asked("signal") or "", re.IGNORECASE)
        if not said:
            return None
        name = SIGNALS.get(said[2], said[2].upper())
        return name, "B" in (said[1] or "").upper(), int(said[3] or 60)

    @property
    def requeues(self) -> bool:
        return self.asked("requeue") is not None or self.has(r"\bscontrol\s+requeue\b") or self.kept

    @property
    def kept(self) -> bool:
        return any(step.kept for step in self.steps)

    @property
    def whole_nodes(self) -> bool:
        return self.asked("exclusive") == ""

    def number(self, text: str) -> int | None:
        """What a text comes to, with what Slurm will say; None where it is not known."""
        known = {
            "SLURM_NNODES": self.fixed_nodes,
            "SLURM_JOB_NUM_NODES": self.fixed_nodes,
            "SLURM_GPUS_ON_NODE": self.gpus,
            "SLURM_GPUS_PER_NODE": whole(self.asked("gpus-per-node")),
            "SLURM_NTASKS_PER_NODE": whole(self.asked("ntasks-per-node")),
            "SLURM_CPUS_PER_TASK": whole(self.asked("cpus-per-task")),
        }
        if re.search(r"SLURM_(NTASKS|NPROCS)\b", text):
            known |= dict.fromkeys(("SLURM_NTASKS", "SLURM_NPROCS"), self.total())
        values = {name: (str(value),) for name, value in known.items() if value is not None}
        filled = shell.fill(shell.shown(text), values).strip()
        arithmetic = re.fullmatch(r"\$\(\((.*)\)\)", filled)
        return evaluate(arithmetic[1]) if arithmetic else whole(filled)

    # Who starts the training.

    @cached_property
    def launches(self) -> list[Launch]:
        return [launch for step in self.steps for launch in _launches(step)]

    def of(self, *kinds: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.kind in kinds]

    def many(self, launch: Launch) -> bool:
        """Its srun starts several tasks, for certain."""
        return launch.srun is not None and (self.total(launch.srun) or 1) > 1

    def origin(self, text: str, line: int) -> int:
        """The line where a part of a command's words was first written, as the value of a variable."""
        return next((a.line for a in self.assignments if len(a.value) > 3 and a.value in text), line)

    def spread(self, launch: Launch) -> bool:
        """Its srun reaches several nodes."""
        own = launch.srun
        if own is None or ("nodelist" in own and "nodes" not in own) or self.total(own) == 1:
            return False
        return (self.number(own["nodes"]) or 1) > 1 if "nodes" in own else self.several

    def variables(self, *names: str) -> Iterator[Assignment]:
        return (a for a in self.assignments if a.name in names)

    def says(self, name: str) -> bool:
        """Sets the variable in any form: also `srun --export=ALL,NAME=...`, `env NAME=...`."""
        return self.has(rf"\b{name}\b")

    # Reading.

    def _read_directives(self, written_elsewhere: set[int]) -> None:
        started = False
        for number, line in enumerate(self.lines, 1):
            if number in written_elsewhere:  # the script makes another one
                continue
            if re.match(r"#SBATCH(?=\s|-)", line):
                written = line.removeprefix("#SBATCH")
                (self.late if started else self.directives).extend(directives(number, written))
            elif match := re.match(
                r"(\s+#SBATCH|\s*#\s+SBATCH|\s*##+\s*SBATCH|#sbatch|#Sbatch)\s+-{1,2}(\w[\w-]*)", line
            ):
                self.unread.append((number, match[1].strip() or match[1], SHORT.get(match[2], match[2])))
            elif line.strip() and not line.lstrip().startswith("#"):
                started = True

    def _read_commands(self, found: list[Command], around: Around, values: dict[str, tuple[str, ...]]) -> None:
        """In their order, so that each sees the variables that are set before it."""
        loose: set[str] = set()  # numbers that differ from branch to branch are not known
        for command in found:
            declares = command.words[0] in DECLARE
            settings, rest = _settings(command.words)
            for name, more, raw in settings:
                if name.startswith("SLURM_"):  # a fallback for where there is no Slurm
                    continue
                value = _value(raw, values)
                if more:
                    old = values.get(name, ())
                    value = old + value if raw.startswith("(") else ("".join((*old, *value)),)
                elif values.get(name, value) != value and "".join(value).isdigit():
                    loose.add(name)
                if name in loose or sum(map(len, value)) > LONGEST:
                    values.pop(name, None)
                elif not rest:
                    values[name] = value
                if rest or command.words[0] == "export":
                    self.exported.add(name)
                self.assignments.append(Assignment(command.line, name, " ".join(value), around.place))
            if command.words[0] == "export":
                self.exported |= set(command.words[1:])
            if rest and not declares:
                self._read_step(command, tuple(shell.expand(rest, values)), around, values)

    def _read_step(
        self, command: Command, words: tuple[str, ...], around: Around, values: dict[str, tuple[str, ...]]
    ) -> None:
        if not words:
            return
        words = tuple(DEFAULT.sub(r"\1", word) for word in words)
        srun, kept, behind = around.srun, around.kept, words
        if not _talks(words):
            kept = kept or re.search(r"(^|\s|/)(snell|snell_dist) keep ", " ".join(words)) is not None
            at = next((k for k, w in enumerate(words) if w.rpartition("/")[2] == "srun"), None)
            if at is not None:
                srun, last = options(words[at + 1 :], FLAGS, BARE)
                behind = words[at + 1 + last :]
        self.steps.append(Step(command, words, around.place, srun, kept))
        if command.heredoc and words[0] == "cat" and (target := _target(words)):
            self.files[target] = command.heredoc
        elif not _talks(words):
            within = Around("task" if srun is not None else around.place, srun, kept)
            if behind is not words:  # the batch shell has expanded what it hands on
                values = {name: tuple(v.replace("$", shell.EARLIER) for v in value) for name, value in values.items()}
            self._read_commands(self._nested(command, behind), within, dict(values))

    def _nested(self, command: Command, words: tuple[str, ...]) -> list[Command]:
        """What a shell among the words is told to do: by -c, by a heredoc, by a file that the script has written."""
        at = next((k for k, w in enumerate(words) if w.rpartition("/")[2] in SHELLS), None)
        after = words[at + 1 :] if at is not None else words[:1]
        told = next((k for k, w in enumerate(after) if at is not None and re.fullmatch(r"-\w*c", w)), None)
        if told is not None:
            text = shell.inner(after[told + 1]) if len(after) > told + 1 else ""
            return _moved(shell.commands(text), command, after[told + 2 :])
        document = command.heredoc if at is not None and after in ((), ("-",), ("-s",)) else None
        document = document or self.files.get(after[0].removeprefix("./") if after else "")
        if document is None:
            return []
        text = document.text if document.quoted else shell.inner(document.text.replace("\\$", shell.LATER))
        return shell.commands(text, document.line)


def _moved(found: list[Command], to: Command, arguments: tuple[str, ...]) -> list[Command]:
    """Commands of `bash -c`: on its line, in the background or in a pipeline where it is, with what $0 and $@ are."""
    given = [shlex.quote(word.replace("$", shell.EARLIER)) for word in arguments]
    known = {"$0": given[:1], "$@": given[1:]}
    moved = []
    for command in found:
        words = [w for word in command.words for w in (known.get(word.strip('"'), [word]) if given else [word])]
        line, background = to.line + command.line - 1, to.background or command.background
        moved.append(replace(command, line=line, words=tuple(words) or (":",), background=background))
    return [*moved[:-1], *(replace(command, after=to.after) for command in moved[-1:])]


def _target(words: tuple[str, ...]) -> str | None:
    """The file that `cat > FILE` writes."""
    at = next((k for k, w in enumerate(words) if w in (">", ">>")), None)
    return words[at + 1].removeprefix("./") if at is not None and len(words) > at + 1 else None


def _settings(words: tuple[str, ...]) -> tuple[list[tuple[str, bool, str]], tuple[str, ...]]:
    """`NAME=value` at the head (`export`: anywhere) as name, whether it is +=, and value; and what follows."""
    declares = words[0] in DECLARE
    found: list[tuple[str, bool, str]] = []
    for k, word in enumerate(words):
        match = ASSIGNMENT.match(word)
        if match:
            found.append((match[1], bool(match[2]), match[3]))
        elif not declares:
            return found, words[k:]
    return found, ()


def _value(raw: str, values: shell.Values) -> tuple[str, ...]:
    if raw.startswith("("):
        return tuple(shell.expand(shell.array(raw), values))
    return (shell.fill(shell.unquote(raw), values),)


def _talks(words: tuple[str, ...]) -> bool:
    return TALK.fullmatch(words[0]) is not None or (words[0] == "conda" and words[1:2] != ("run",))


def _launches(step: Step) -> Iterator[Launch]:
    if _talks(step.words):
        return
    begin = step.words.index("--") if step.kept and "--" in step.words else 0  # behind `python -m snell_dist keep`
    for k, word in enumerate(step.words[begin:], begin):
        base = word.rpartition("/")[2]
        if base in SHELLS:  # what that does is a step of its own
            return
        kind, after = _launcher(base, step.words[k + 1 :])
        if kind:
            found, _ = options(after, LAUNCHER_FLAGS, "muh") if kind != "python" else ({}, 0)
            yield Launch(step.line, kind, found, step)
            return


def _launcher(base: str, after: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """What a word starts, and the words that follow its name."""
    if base in ("torchrun", "deepspeed"):
        return base, after
    if base == "accelerate" and after[:1] == ("launch",):
        return "accelerate", after[1:]
    if base == "snell" and after[:1] == ("train",):
        return "snell", after
    if not re.fullmatch(r"python[\d.]*", base):
        return "", ()
    k = 0
    while k < len(after) and after[k].startswith("-") and after[k] not in ("-m", "-c", "-"):
        k += 2 if after[k] in ("-W", "-X") else 1
    module = after[k + 1] if after[k : k + 1] == ("-m",) and len(after) > k + 1 else ""
    if re.fullmatch(r"torch\.distributed\.(run|launch|launcher)", module):
        return "torchrun", after[k + 2 :]
    if module == "deepspeed.launcher.runner":
        return "deepspeed", after[k + 2 :]
    if module.startswith("accelerate.commands.launch"):
        return "accelerate", after[k + 2 :]
    silent = after[k : k + 1] in ((), ("-c",), ("-",)) or module in NO_TRAINING
    return ("", ()) if silent else ("python", after[k:])
