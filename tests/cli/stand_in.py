"""A client that answers from a script, for commands that are tested without a daemon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.cli import reports
from xditd.protocol.errors import XditError
from xditd.protocol.messages import Loaded, MemoryFreed, MemoryStatus, ModelInfo, Queued, Slept, Unloaded
from xditd.protocol.noise import Noise


class Scripted:
    """Plays `xditd.client.Client`. `answers` holds a value, a function or an error to raise by method name.

    Args:
        events: by method name, what is heard while it is waited for, beside the phases.
    """

    daemon_version = "0.1.0"

    def __init__(self, events: Mapping[str, Sequence[Any]] | None = None, **answers: Any) -> None:
        self.events = events or {}
        self.answers: dict[str, Any] = {
            "status": reports.report(),
            "models": reports.models(),
            "load": Loaded(
                re=1,
                group="g3",
                plan=reports.PLAN,
                model=reports.models().models[0],
                dtype="bfloat16",
                seconds=4.2,
                warm=False,
            ),
            "unload": Unloaded(re=1, groups=("g3", "g4")),
            "sleep": Slept(re=1, groups=("g3",), before=(), after=()),
            "free_memory": MemoryFreed(
                re=1,
                groups=("g4",),
                in_use=("g3",),
                before=(MemoryStatus(device="cuda:0", total=80 << 30, used=60 << 30, models=50 << 30),),
                after=(MemoryStatus(device="cuda:0", total=80 << 30, used=35 << 30, models=25 << 30),),
            ),
            "cancel": None,
            "drain": None,
        } | answers
        self.asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def connect(self, endpoint: str | None, **options: Any) -> Scripted:
        self.asked.append(("connect", (endpoint,), options))
        return self._answer("connect") or self

    def _answer(self, name: str, *arguments: Any) -> Any:
        answer = self.answers.get(name)
        if isinstance(answer, XditError):
            raise answer
        return answer(*arguments) if isinstance(answer, Callable) else answer

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.answers:
            raise AttributeError(name)

        def method(*arguments: Any, on_event: Callable[[Any], None] | None = None, **named: Any) -> Any:
            self.asked.append((name, arguments, named))
            if on_event is not None:
                for phase in ("waiting", "importing", "importing", "loading"):
                    on_event(Queued(re=1, run=None, position=0, phase=phase))
                for event in self.events.get(name, ()):
                    on_event(event)
            return self._answer(name)

        return method

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *exception: object) -> None:
        self.asked.append(("close", (), {}))


class ScriptedRun:
    """Plays `xditd.client.Run` of a small Flux: a sample that is the noise halved, in steps."""

    def __init__(self, variant: str = "dev", fails: BaseException | None = None) -> None:
        self.id, self.group, self.plan, self.lora, self.degraded = 7, "g3", reports.PLAN, (), ""
        facts = {"context_width": 64, "pooled_width": 32, "latent_channels": 16, "scale": 8}
        self.model = ModelInfo(
            kind="diffusion_models",
            name="small.safetensors",
            part="transformer",
            family="flux",
            variant=variant,
            dtype="bfloat16",
            bytes=1,
            parameters=1,
            facts=facts,
            noise=Noise(predicts="flow"),
        )
        self.fails = fails
        self.conditioning: dict[str, tuple[Any, Any]] = {}
        self.sampled: dict[str, Any] = {}
        self.ended: list[str] = []

    def put_conditioning(self, key: str, tensors: Any, values: Any) -> None:
        self.conditioning[key] = (tensors, values)

    def sample(self, noise: Any, sigmas: Any, conditioning: str, **named: Any) -> Any:
        self.sampled = {"noise": noise, "sigmas": sigmas, "conditioning": conditioning} | named
        for step, sigma in enumerate(sigmas[1:], 1):
            named["callback"](step, len(sigmas) - 1, sigma, None)
            if self.fails is not None:
                raise self.fails
        return noise * 0.5

    def cancel(self) -> None:
        self.ended.append("cancel")

    def __enter__(self) -> ScriptedRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.append("close")
