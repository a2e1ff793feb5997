"""In bfloat16 a network is as far off its float32 as plain diffusers' own is, and not further."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.rounding import ALL, BOUND, compare


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_within_its_noise_floor(tmp_path: Path, name: str) -> None:
    for size, (ours, floor) in compare(name, tmp_path).items():
        assert 1e-3 < floor < 0.1, (
            size
        )  # the arithmetic of a reference is bfloat16, and still that of the model
        assert 0 < ours <= BOUND * floor, size
