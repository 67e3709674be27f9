"""The command with slow steps, so that faults come in the midst of them: python slowly.py FILE train ...

A step takes a fifth of a second more while FILE exists.
"""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

from snell_dist import optim

file = Path(sys.argv.pop(1))
lr_at = optim.lr_at


def slowly(*arguments: Any) -> float:
    if file.exists():
        time.sleep(0.2)
    return lr_at(*arguments)


optim.lr_at = slowly
runpy.run_module("snell_dist", run_name="__main__")
