"""xditd: a daemon that keeps xfuser diffusion models warm across GPUs, and its light client.

Importing this package costs nothing: no torch, no ZeroMQ. `xditd.client.Client` is where a program starts.
"""

__version__ = "0.1.0"
