"""``python -m pyrobc`` is ``pyrobc``."""

import sys

from pyrobc.cli import main

sys.exit(main())
