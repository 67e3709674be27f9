"""A shipped script, filled in: what a plan says replaces its `#SBATCH` lines and comes before its defaults."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from snell_dist.config import PACKAGE
from snell_dist.launch.plan import Plan

# In a wheel the folder lies inside the package, in a checkout at its top.
SCRIPTS = next((p for p in (PACKAGE / "launch" / "scripts", PACKAGE.parent / "launch") if p.is_dir()), PACKAGE)
HEADER = re.compile(r"#SBATCH --(?P<key>[a-z-]+)(?:=(?P<value>\S+))?(?P<rest>\s+#.*)?")
STRICT = "set -euo pipefail"


def shipped() -> list[str]:
    """Names of the scripts that come with the package, such as `slurm/torchrun.sbatch`."""
    return sorted(p.relative_to(SCRIPTS).as_posix() for p in SCRIPTS.rglob("*") if p.suffix in (".sh", ".sbatch"))


def render(plan: Plan, command: str) -> str:
    """The script of a plan; `command` is what made it, to be found in it."""
    text = with_options((SCRIPTS / plan.script).read_text(encoding="utf-8"), plan.options)
    return _filled(text, plan, command)


def with_options(text: str, options: Mapping[str, str | None]) -> str:
    """Replaces, adds and (None) leaves out `#SBATCH` lines. Reasons stay where they stood; twice is as once."""
    lines, last, missing = [], 0, dict(options)
    for line in text.splitlines():
        match = HEADER.fullmatch(line)
        if match is None:
            lines.append(line)
            continue
        if match["key"] in options:
            value = missing.pop(match["key"])
            if value is None:
                continue
            line = _header(match["key"], value, match["rest"])
        lines.append(line)
        last = len(lines)
    lines[last:last] = [_header(key, value) for key, value in missing.items() if value is not None]
    return "\n".join(lines) + "\n"


def _header(key: str, value: str, reason: str | None = None) -> str:
    said = f"#SBATCH --{key}={value}"
    return f"{said:34} {reason.strip()}" if reason else said


def _filled(text: str, plan: Plan, command: str) -> str:
    block = [
        STRICT,
        f"# Filled in by: {' '.join(command.splitlines())}",
        f'set -- {shlex.join(plan.words)} "$@"',
        *(f"{name}={shlex.quote(value)}" for name, value in plan.settings.items()),
    ]
    before, found, after = text.partition(f"{STRICT}\n")
    assert found, f"{plan.script} has no line {STRICT!r}"
    return "\n".join([before + block[0], *block[1:], "", after])
