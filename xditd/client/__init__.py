"""The client: blocking, for any thread of any program. `from xditd.client import Client`. Imports no torch."""

from xditd.client.client import Client
from xditd.client.degraded import Degraded, DegradedWarning
from xditd.client.run import Run

__all__ = ["Client", "Degraded", "DegradedWarning", "Run"]
