"""`torchrun -m snell_dist train CONFIG`, for launchers that start a module."""

import sys

from snell_dist.cli import main

sys.exit(main())
