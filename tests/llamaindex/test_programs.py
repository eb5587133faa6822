"""Whole programs: the example, `bursar run` over a program that says nothing of budgets, and what importing costs."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("llama_index.core")

from bursar.testing.provider import Answer, Provider

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAI
llm = OpenAI(model="gpt-4o", api_base=sys.argv[1], api_key="any", max_tokens=500, max_retries=0)
for _ in range(30):
    list(llm.stream_chat([ChatMessage(role="user", content="hello")]))
"""


def test_the_example_stops_at_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llamaindex_agents.py"])
    runpy.run_path(str(ROOT / "examples/llamaindex/llamaindex_agents.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert "The budget 'per-run'" in told
    assert "planner: 0.001" in told
    assert "writer: 0.000" in told


def test_bursar_run_guards_a_program_that_says_nothing_of_budgets(tmp_path: Path) -> None:
    """Each call is counted once, though the OpenAI client below LlamaIndex could be guarded too."""
    (tmp_path / "program.py").write_text(PROGRAM)
    bursar = str(Path(sysconfig.get_path("scripts")) / "bursar")
    with Provider(Answer(input_tokens=1_000, output_tokens=500)) as provider:
        command = [bursar, "run", "--budget", "0.078 USD", "--", sys.executable, "program.py", f"{provider.url}/v1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ})
        assert done.returncode != 0
        assert "BudgetExceeded" in done.stderr
        assert provider.billed_calls == 10


def test_importing_the_adapter_adds_little_to_importing_the_framework() -> None:
    """At most 50 ms of the processor's time; measured 19."""
    code = (
        "import gc, time, llama_index.core; gc.collect(); gc.disable(); start = time.process_time();"
        "import bursar_llamaindex; print(time.process_time() - start)"
    )

    def added_s() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert any(added_s() <= 0.050 for _ in range(3))  # the best of three, and mostly one is enough
