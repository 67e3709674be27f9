"""`torchrun -m snell_dist train CONFIG`, for launchers that start a module."""

import sys

from snell_dist import dist
from snell_dist.cli import main

dist.leave(main()) if dist.world_size() > 1 else sys.exit(main())
