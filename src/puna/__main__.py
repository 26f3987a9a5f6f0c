"""`python -m puna` is `puna`."""

from __future__ import annotations

import sys

from puna.cli import main

sys.exit(main())
