"""A record of what a folder of datasets holds, to find every later change by."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snell_dist import run_folder
from snell_dist.config import UserError
from snell_dist.data_tools.check import Found, Missing, look

FORMAT = "snell_dist data 1"


def as_json(found: list[Found], missing: list[Missing]) -> str:
    content = {"format": FORMAT, "found": [asdict(f) for f in found], "missing": [asdict(m) for m in missing]}
    return json.dumps(content, indent=1)


def write(root: Path, file: Path) -> list[Found]:
    """Records what is there, with a hash of every split's files. UserError where something is broken."""
    found, missing = look(root, quick=False, contents=True)
    broken = [f.dataset for f in found if not f.sound]
    if broken:
        raise UserError(f"{root}: {', '.join(broken)}: broken, see snell data check; no manifest was written")
    run_folder.write_atomic(file, as_json(found, missing) + "\n")
    return found


def differences(root: Path, manifest: Path) -> list[str]:
    """How the data differs from a manifest; empty where it does not. UserError where that is none."""
    try:
        recorded: Any = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{manifest}: no such manifest") from None
    except (OSError, ValueError):
        raise UserError(f"{manifest}: is no manifest of snell data manifest") from None
    if not isinstance(recorded, dict) or recorded.get("format") != FORMAT:
        raise UserError(f"{manifest}: is no manifest of this version (format {FORMAT!r})")
    found, _ = look(root, quick=True, contents=True)
    now = {(f.benchmark, f.dataset): asdict(f)["splits"] for f in found}
    then = {(f["benchmark"], f["dataset"]): f["splits"] for f in recorded["found"]}
    said = []
    for key in sorted(now.keys() | then.keys()):
        name = " ".join(key)
        if key not in now or key not in then:
            said.append(f"{name}: {'is gone' if key not in now else 'is not in the manifest'}")
            continue
        for split in then[key]:
            for kind, word in (("list_sha256", "its list differs"), ("content_sha256", "its files differ")):
                if now[key].get(split, {}).get(kind) != then[key][split][kind]:
                    said.append(f"{name} {split}: {word}")
                    break
    return said
