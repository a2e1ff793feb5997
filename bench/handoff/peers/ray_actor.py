"""Ray's default actor call: tensors as arguments, the answer by `ray.get`.

Ray's own processes (raylet, object store) are the daemon here; one more hop through an actor in the middle would
only make it slower.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from bench.handoff import child
from bench.handoff.peers import EVERY, Unavailable


class RayActor:
    name = "ray"
    says = "Ray's default actor call with torch tensors, driver to actor through the object store"
    payloads = EVERY

    _ray: Any = None

    def start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise Unavailable(f"ray is not installed ({error}); pip install 'xditd[ray]'") from error
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=1 << 30,
            runtime_env={"env_vars": {"PYTHONPATH": child.ROOT}},
        )
        self._ray = ray
        self._rank = ray.remote(num_cpus=1)(_Rank).remote()
        self.once("S", {"x": torch.zeros(1)})

    def prepare(self, payload: str) -> None:
        """Nothing is kept between jobs."""

    def once(self, payload: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._ray.get(self._rank.answer.remote(inputs))

    def stop(self) -> None:
        if self._ray is not None:
            self._ray.shutdown()


class _Rank:
    def __init__(self) -> None:
        from bench.handoff.echo import Echo

        torch.set_num_threads(1)
        self._echo = Echo()

    def answer(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._echo(inputs)
