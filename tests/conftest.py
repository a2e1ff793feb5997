"""ComfyUI wants an `__init__.py` at the top of the repository. For pytest the top is no package all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]


class TopIsNoPackage:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == TOP else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TopIsNoPackage())
