"""Known traps in launch scripts for sbatch and the shell, each with why it is one and the mend.

The script may train anything. It is read, never run; where something cannot be known, the rules are silent.
A comment anywhere in the script, `# snell: allow RULE [RULE ...]`, silences rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from snell_dist.config import nearest
from snell_dist.launch.lint import rules_counts, rules_file, rules_meeting, rules_speed, rules_survival
from snell_dist.launch.lint.rule import ALL, ERROR, WARNING, Finding
from snell_dist.launch.lint.script import Script

__all__ = ["ERROR", "RULES", "WARNING", "Finding", "lint", "report"]

MODULES = rules_file, rules_meeting, rules_counts, rules_survival, rules_speed  # which fill ALL
ALLOW = re.compile(r"#\s*snell:\s*allow\s+(.*)")
UNKNOWN = "unknown-rule"
RULES = {each.id: each.about for each in ALL.values()} | {UNKNOWN: "a comment allows a rule that does not exist"}


def lint(text: str, name: str) -> list[Finding]:
    """The traps of one script, in the order of its lines. `name`: the file's; *.sbatch and *.slurm are for sbatch."""
    script = Script(text, name)
    allowed = dict(_allowed(script))
    found = [f for each in ALL.values() if each.id not in allowed for f in each.findings(script)]
    for rule, line in allowed.items():
        if rule not in RULES:
            what = f"allow {rule}: no such rule{nearest(rule, RULES)}"
            found.append(Finding(UNKNOWN, line, WARNING, what, "it silences nothing", "snell launch lint --rules"))
    return sorted(found, key=lambda each: each.line or 0)


def _allowed(script: Script) -> list[tuple[str, int]]:
    matches = ((number, ALLOW.search(line)) for number, line in enumerate(script.lines, 1))
    return [(rule, number) for number, match in matches if match for rule in re.split(r"[,\s]+", match[1].strip())]


def report(findings: Sequence[Finding], name: str) -> str:
    """One block a finding, to read."""
    blocks = []
    for each in findings:
        place = name if each.line is None else f"{name}:{each.line}"
        blocks += [
            f"{place}: {each.severity}: {each.rule}: {each.what}",
            f"    why: {each.why}",
            f"    mend: {each.mend}",
        ]
    return "\n".join(blocks) if blocks else f"{name}: no trap found"
