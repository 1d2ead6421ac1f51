"""`python -m recfx`: the same as `recfx`."""

import sys

from recfx.cli import main

sys.exit(main())
