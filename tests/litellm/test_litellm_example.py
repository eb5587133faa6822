"""Whole programs: the examples run offline to their end, and `bursar run` guards what says nothing of budgets."""

from __future__ import annotations

import logging
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bursar.testing.provider import Provider

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "litellm").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example.name])
    try:
        runpy.run_path(str(example), run_name="__main__")
    finally:
        logging.disable(logging.NOTSET)  # which it does, as LiteLLM logs every error that it raises
    said = capsys.readouterr().out
    assert "refused the call" in said
    assert "gpt-4o-mini" in said


def test_bursar_run_guards_a_program_that_says_nothing(tmp_path: Path) -> None:
    program = """
import sys
from litellm import completion

try:
    completion(
        "openai/gpt-4o", [{"role": "user", "content": "hello"}], max_tokens=500, api_base=sys.argv[1], api_key="any"
    )
except RuntimeError as error:
    print(type(error).__name__)
"""
    bursar = Path(sys.executable).with_name("bursar")
    with Provider() as provider:
        command = [bursar, "run", "--budget", "0.000001 USD", "--", sys.executable, "-c", program, f"{provider.url}/v1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "LiteLLMBudgetExceeded" in done.stdout
        assert provider.requests == 0
