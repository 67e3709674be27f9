"""What a rule is, and what it finds. A rule is one function, told apart by its id; `@rule` registers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from snell_dist.launch.lint.script import Script

ERROR, WARNING = "error", "warning"
Found = Iterator[tuple[int | None, str]]  # the line, and what stands there


@dataclass(frozen=True)
class Finding:
    """One trap in a script. `line` counts from 1; None: it concerns the whole file."""

    rule: str
    line: int | None
    severity: str  # "error": it will not train as meant; "warning": it will, until something happens
    what: str
    why: str
    mend: str


@dataclass(frozen=True)
class Rule:
    id: str
    severity: str
    about: str
    why: str
    mend: str
    look: Callable[[Script], Found]

    def findings(self, script: Script) -> Iterator[Finding]:
        for line, what in dict.fromkeys(self.look(script)):
            yield Finding(self.id, line, self.severity, what, self.why, self.mend)


ALL: dict[str, Rule] = {}


def rule(id: str, severity: str, *, about: str, why: str, mend: str) -> Callable[[Callable[[Script], Found]], Rule]:
    """Makes a function that yields lines a rule, and adds it to ALL."""

    def register(look: Callable[[Script], Found]) -> Rule:
        assert id not in ALL
        ALL[id] = Rule(id, severity, about, why, mend, look)
        return ALL[id]

    return register
