"""A record of what a folder of datasets holds, to find every later change by."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--out {file}: {'is a folder' if file.is_dir() else 'its folder is not there'}; name a file")
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
    try:
        then = _hashes(recorded["found"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{manifest}: is damaged; record it anew by snell data manifest") from None
    found, _ = look(root, quick=True, contents=True)
    now = _hashes(asdict(f) for f in found)
    said = []
    for key in sorted(now.keys() | then.keys()):
        name = " ".join(key)
        if key not in now or key not in then:
            said.append(f"{name}: {'is gone' if key not in now else 'is not in the manifest'}")
            continue
        for split, recorded_hashes in then[key].items():
            hashes = now[key].get(split, (None, None))
            if hashes != recorded_hashes:
                what = "its list differs" if hashes[0] != recorded_hashes[0] else "its files differ"
                said.append(f"{name} {split}: {what}")
    return said


def _hashes(found: Iterable[Any]) -> dict[tuple[str, str], dict[str, tuple[str, str]]]:
    """By (benchmark, dataset) and split: of its list and of its files."""
    return {
        (f["benchmark"], f["dataset"]): {
            name: (split["list_sha256"], split["content_sha256"]) for name, split in f["splits"].items()
        }
        for f in found
    }
