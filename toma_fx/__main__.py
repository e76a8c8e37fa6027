"""``python -m toma_fx`` is the command line."""

import sys

from toma_fx.cli import main

sys.exit(main())
