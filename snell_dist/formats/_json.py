"""Libraries' configurations, which are objects in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(file: Path) -> dict[str, Any]:
    """Empty where there is no such file, or something else in it."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
