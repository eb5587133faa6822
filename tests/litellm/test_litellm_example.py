"""The examples of the LiteLLM adapter run offline, to their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("litellm")

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "litellm").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused the call" in done.stdout
    assert "gpt-4o-mini" in done.stdout
