"""Known traps in launch scripts for sbatch and the shell, each with why it is one and the mend.

The script may train anything. It is read, never run; where something cannot be known, the rules are silent.
A comment anywhere in the script, `# snell: allow RULE [RULE ...]`, silences rules.
"""

from __future__ import annotations

from collections.abc import Sequence

from snell_dist.launch.lint import rules_counts, rules_file, rules_meeting, rules_speed, rules_survival
from snell_dist.launch.lint.rule import ALL, ERROR, WARNING, Finding, Rule
from snell_dist.launch.lint.script import Script

__all__ = ["ERROR", "RULES", "WARNING", "Finding", "Rule", "lint", "report"]

MODULES = rules_file, rules_meeting, rules_counts, rules_survival, rules_speed  # which fill ALL
RULES = tuple(ALL.values())


def lint(text: str, name: str) -> list[Finding]:
    """The traps of one script, in the order of its lines. `name`: the file's; *.sbatch and *.slurm are for sbatch."""
    script = Script(text, name)
    found = [finding for each in RULES if each.id not in script.allowed for finding in each.findings(script)]
    return sorted(found, key=lambda each: each.line or 0)


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
