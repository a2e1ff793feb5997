"""One thread for torch: ranks and other tests want the cores, and small tensors gain nothing from more."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
