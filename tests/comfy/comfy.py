"""A real ComfyUI, headless, in a process of its own: started, given workflows, listened to, killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import websocket

from tests.live.service import wait_for

ROOT = Path(__file__).parents[2]


class Comfy:
    """`python main.py --cpu` of a checkout, with models, nodes and outputs in a folder of its own.

    Args:
        checkout: of ComfyUI.
        python: of its environment.
        base: the folder; `models` is below it, and a link to our nodes is made in `custom_nodes`.
        environment: variables, beyond this process's own.
    """

    def __init__(
        self, checkout: Path, python: str, base: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.base = base
        nodes = base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        if not (nodes / "xditd").exists():
            (nodes / "xditd").symlink_to(ROOT / "comfy_nodes")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = base / "comfyui.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    python,
                    "main.py",
                    "--cpu",
                    f"--port={self.port}",
                    f"--base-directory={base}",
                    "--preview-method=latent2rgb",
                ],
                cwd=checkout,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": "", **(environment or {})},
            )
        wait_for(lambda: self._serves() or self.process.poll() is not None, "ComfyUI to serve", seconds=180)
        assert self.process.poll() is None, self.said()
        self.client = uuid.uuid4().hex
        self.events = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}", timeout=120
        )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers["Content-Type"] else body

    def post(self, path: str, content: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def ask(self, workflow: Mapping[str, Any]) -> str:
        """Queues a workflow in API form. Returns the prompt's id."""
        answer = self.post("prompt", {"prompt": workflow, "client_id": self.client})
        assert "prompt_id" in answer, answer
        return str(answer["prompt_id"])

    def hear(self) -> Iterator[Event]:
        """Events as they come, without end."""
        while True:
            yield Event(self.events.recv())

    def run(self, workflow: Mapping[str, Any], on_event: Callable[[Event], None] | None = None) -> Outcome:
        """Runs a workflow to its end."""
        prompt = self.ask(workflow)
        outcome = Outcome(prompt)
        for event in self.hear():
            outcome.note(event)
            if on_event is not None:
                on_event(event)
            if outcome.over:
                return outcome
        raise AssertionError("unreachable")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def _serves(self) -> bool:
        try:
            return bool(self.get("system_stats"))
        except OSError:
            return False


class Event:
    """A message of ComfyUI's websocket: JSON with a type, a preview image, or a node's text."""

    def __init__(self, message: str | bytes) -> None:
        self.at = time.monotonic()
        self.image, self.text = b"", ""
        self.type, self.data = "", {}
        if isinstance(message, str):
            content = json.loads(message)
            self.type, self.data = content["type"], content.get("data") or {}
        elif (kind := int.from_bytes(message[:4], "big")) in (1, 4):
            self.type, self.image = "preview", message[4:]
        elif kind == 3:
            length = int.from_bytes(message[4:8], "big")
            self.type, self.text = "text", message[8 + length :].decode()


class Outcome:
    """What came of a prompt."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.over = self.interrupted = False
        self.error: dict[str, Any] = {}
        self.progress: list[tuple[int, int]] = []
        self.previews: list[bytes] = []
        self.texts: list[str] = []
        self.outputs: dict[str, Any] = {}

    def note(self, event: Event) -> None:
        if event.type == "text":
            self.texts.append(event.text)
        elif event.type == "preview":
            self.previews.append(event.image)
        if event.data.get("prompt_id") != self.prompt:
            return
        if event.type == "progress":
            self.progress.append((event.data["value"], event.data["max"]))
        elif event.type == "executed":
            self.outputs[event.data["node"]] = event.data.get("output")
        elif event.type in ("execution_success", "execution_error", "execution_interrupted"):
            self.over = True
            self.interrupted = event.type == "execution_interrupted"
            self.error = event.data if event.type == "execution_error" else {}
