"""`python -m xditd.rank`, as the daemon's executor starts it."""

from __future__ import annotations

import sys

from xditd.rank.main import main

sys.exit(main())
