"""Options of sbatch, srun and the launchers as they are written, and the numbers in them."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SHORT = {  # of sbatch and srun
    **{"A": "account", "a": "array", "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error"},
    **{"G": "gpus", "J": "job-name", "K": "kill-on-bad-exit", "N": "nodes", "n": "ntasks", "o": "output"},
    **{"p": "partition", "q": "qos", "t": "time", "W": "wait", "w": "nodelist", "x": "exclude", "C": "constraint"},
}
ALIKE = {"tasks-per-node": "ntasks-per-node"}
FLAGS = re.compile(  # of sbatch and srun, that take no word after them
    r"exclusive|exact|overlap|unbuffered|label|no-kill|overcommit|verbose|quiet|requeue|no-requeue|preserve-env"
    r"|pty|kill-on-bad-exit|contiguous|spread-job|multi-prog|oversubscribe|parsable|test-only|propagate"
    r"|use-min-nodes|container-mount-home|no-container-mount-home|container-writable|container-readonly"
    r"|container-remap-root|container-entrypoint|no-container-entrypoint"
)
BARE = "lusvqkOQEXZKHI"  # the same, of one letter
SIGNALS = {"10": "USR1", "12": "USR2", "15": "TERM", "2": "INT", "1": "HUP"}


@dataclass(frozen=True)
class Directive:
    line: int
    name: str  # long, without dashes
    value: str
    written: str


def directives(line: int, written: str) -> Iterator[Directive]:
    """One line may hold several options; what follows ` #` is a comment."""
    words = re.sub(r"\s#.*", "", written).split()
    k = 0
    while k < len(words):
        word = words[k]
        named, equals, value = word.partition("=")
        if word.startswith("--"):
            name = named[2:]
        elif word.startswith("-") and len(word) > 1:
            name, value, equals = SHORT.get(word[1], word[1]), word[2:], word[2:]
        else:
            k += 1
            continue
        flag = FLAGS.fullmatch(name) if word.startswith("--") else word[1] in BARE
        if not equals and not flag and k + 1 < len(words) and not words[k + 1].startswith("-"):
            k += 1
            value = words[k]
        yield Directive(line, ALIKE.get(name, name), value.strip("'\""), " ".join(words))
        k += 1


def options(words: tuple[str, ...], flags: re.Pattern[str], bare: str) -> tuple[dict[str, str], int]:
    """Options at the head of words, by their long names with dashes, and how many words they take."""
    found: dict[str, str] = {}
    k = 0
    while k < len(words):
        word = words[k]
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("_", "-")
            if not equals and not flags.fullmatch(name) and k + 1 < len(words):
                k += 1
                value = words[k]
        elif re.match(r"-[A-Za-z]", word):
            name, value = SHORT.get(word[1], word[1]), word[2:].removeprefix("=")
            if not value and word[1] not in bare and k + 1 < len(words):
                k += 1
                value = words[k]
        elif word.startswith("$") or word == "":  # more options, perhaps
            name, value = "?", word
        else:
            break
        found[ALIKE.get(name, name)] = value
        k += 1
    return found, k


def seconds(limit: str) -> int | None:
    """Of Slurm's six ways to write a time."""
    said = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not said:
        return None
    days, (first, second, third) = said[1], (int(part or 0) for part in said.groups()[1:])
    if days is not None:
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    return (first * 60 + second) * 60 + third if said[4] else first * 60 + second


OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(text: str) -> int | None:
    """Shell arithmetic of whole numbers; None where there is more in it."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(ast.parse(text.strip().replace("/", "//"), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None


def whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def counted(text: str | None) -> int | None:
    """Of a count that may name a type before it: `a100:4`."""
    return whole((text or "").rpartition(":")[2])
