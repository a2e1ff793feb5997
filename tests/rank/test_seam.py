"""xfuser is the version that the seam was made for, and what the seam changes is where it was.

Read from source, without importing it: a new version fails here in a moment, and says what moved.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from xditd.rank import xfuser_seam

ROOT = Path(str(importlib.util.find_spec("xfuser").submodule_search_locations[0])).parent  # type: ignore[union-attr,index]


def source(module: str) -> ast.Module:
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = ROOT / module.replace(".", "/") / "__init__.py"
    return ast.parse(path.read_text())


def names(module: str) -> set[str]:
    """What a module defines, assigns or imports at its top level, in conditionals too."""
    found: set[str] = set()
    for node in ast.walk(source(module)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(alias.asname or alias.name for alias in node.names)
    return found


def test_the_seam_was_made_for_this_xfuser() -> None:
    assert importlib.metadata.version("xfuser") == xfuser_seam.VERSION


@pytest.mark.parametrize("module", xfuser_seam.PATCHED)
def test_what_is_patched_is_there(module: str) -> None:
    assert set(xfuser_seam.PATCHED[module]) <= names(module)


@pytest.mark.parametrize("package", xfuser_seam.BARE)
def test_packages_that_are_entered_bare_only_import(package: str) -> None:
    """Their `__init__` is not run: it must do nothing but import and name what it exports."""
    body = source(package).body
    allowed = (ast.Import, ast.ImportFrom)
    for node in body:
        text = ast.unparse(node)
        assert isinstance(node, allowed) or "__all__" in text or "optional" in text or text.startswith("'"), (
            text
        )


def test_usp_asks_for_the_attention_function_in_every_call() -> None:
    """On that the pads' removal rests: a fresh function each call, called once a ring step."""
    usp = next(n for n in source("xfuser.model_executor.layers.usp").body if getattr(n, "name", "") == "USP")
    assert "attention_function = _get_attention_function(backend=backend)" in ast.unparse(usp)


def test_flux_passes_its_layer_to_usp_alone() -> None:
    """The wrapper's forward still returns (sample, None) inside a tuple, which `parallel` takes apart."""
    text = ast.unparse(source("xfuser.model_executor.models.transformers.transformer_flux"))
    assert "output = (self.proj_out(hidden_states), None)" in text
    assert "USP(query, key, value, combine_qkv_a2a=True, attn_layer=attn)" in text
