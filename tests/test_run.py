"""`bursar run` guards programs that say nothing of budgets, shows their account, and says when it guarded nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from bursar import Bursar
from bursar.testing.provider import Answer, Provider

BURSAR = str(Path(sysconfig.get_path("scripts")) / "bursar")
LOOP = """
    import openai

    class Mine(openai.OpenAI):
        def __init__(self):
            super().__init__(max_retries=0)
            self.mine = True

    client, mine, asked = openai.OpenAI(), Mine(), [{"role": "user", "content": "hello"}]
    said = dict(model="gpt-4o", max_completion_tokens=500, messages=asked)
    assert mine.mine
    while True:
        for one in (client, client.with_options(timeout=20, max_retries=1), mine, openai):
            one.chat.completions.create(**said)
"""
COST_NANOS = 7_500_000


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500)) as provider:
        yield provider


def run(
    folder: Path, provider: Provider, program: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The program, under `bursar run`, against the provider."""
    (folder / "agent.py").write_text(textwrap.dedent(program))
    env = {**os.environ, "OPENAI_BASE_URL": f"{provider.url}/v1", "OPENAI_API_KEY": "any", **environment}
    env |= {"ANTHROPIC_BASE_URL": provider.url, "ANTHROPIC_API_KEY": "any", "COLUMNS": "200"}
    words = [BURSAR, "run", *(options or ("--budget", "0.05 USD")), "--", sys.executable, "agent.py"]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_plain_clients_are_stopped_at_the_budget(tmp_path: Path, provider: Provider) -> None:
    """One as it is, a copy, one of the user's own class, and the module's own."""
    done = run(tmp_path, provider, LOOP)
    provider.wait_idle()
    assert done.returncode != 0
    assert "BudgetExceeded" in done.stderr
    assert 4 <= provider.billed_calls <= 6
    assert f"{provider.billed_calls} calls, ${provider.billed_calls * COST_NANOS / 1e9:g}, 1 refused" in done.stderr


def test_a_policy_file_holds_and_a_stopped_program_that_ends_well_is_told_by_its_status(
    tmp_path: Path, provider: Provider
) -> None:
    program = """
        import anthropic
        from bursar import BudgetExceeded

        try:
            while True:
                anthropic.Anthropic().messages.create(
                    model="claude-haiku-4-5", max_tokens=500, messages=[{"role": "user", "content": "hello"}]
                )
        except BudgetExceeded:
            print("said goodbye")
    """
    policy = tmp_path / "bursar.toml"
    policy.write_text('[[budget]]\nname = "two"\nlimit = "2 requests"\n')
    options = ("--policy", str(policy), "--store", f"sqlite:///{tmp_path / 'policy.db'}")
    done = run(tmp_path, provider, program, *options)
    assert done.stdout == "said goodbye\n", done.stderr
    assert done.returncode == 3
    assert provider.billed_calls == 2


def test_an_agent_its_tools_client_and_embeddings_are_each_charged_once(tmp_path: Path, provider: Provider) -> None:
    """LangChain's handler guards its models; the plain clients of a tool, and of embeddings, are guarded as such."""
    pytest.importorskip("langchain_openai")
    program = """
        import openai
        from langchain.agents import create_agent
        from langchain_core.tools import tool
        from langchain_openai import ChatOpenAI, OpenAIEmbeddings

        @tool
        def search(query: str) -> str:
            "Search."
            openai.OpenAI().chat.completions.create(
                model="gpt-4o", max_completion_tokens=500, messages=[{"role": "user", "content": query}]
            )
            return "found"

        OpenAIEmbeddings(check_embedding_ctx_length=False).embed_query("hello")
        agent = create_agent(ChatOpenAI(model="gpt-4o", max_tokens=500), [search], name="planner")
        agent.invoke({"messages": [("user", "search")]})
    """
    call = Answer(tool_calls=[("search", {"query": "x"})], input_tokens=1_000, output_tokens=500)
    provider.script([Answer(input_tokens=10), call])
    store = f"sqlite:///{tmp_path / 'run.db'}"
    done = run(tmp_path, provider, program, "--budget", "1 USD", "--store", store)
    assert done.returncode == 0, done.stderr
    with Bursar(store) as bursar:
        records = [record for record in bursar.records() if "tool" not in record.tags or "model" in record.tags]
    assert len(records) == provider.billed_calls == 4
    assert sum(record.cost_nanos for record in records if record.model == "gpt-4o") == 3 * COST_NANOS
    assert {record.tags.get("agent") for record in records} == {None, "planner"}


def test_it_says_plainly_when_it_guarded_nothing(tmp_path: Path, provider: Provider) -> None:
    done = run(tmp_path, provider, "print('hello')")
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert "nothing was guarded" in done.stderr


def test_the_programs_own_status_is_kept(tmp_path: Path, provider: Provider) -> None:
    assert run(tmp_path, provider, "raise SystemExit(7)").returncode == 7


def test_a_sitecustomize_of_the_environment_still_runs(tmp_path: Path, provider: Provider) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('own')\n")
    done = run(tmp_path, provider, "print('program')", PYTHONPATH=str(tmp_path / "own"))
    assert done.stdout == "own\nown\nprogram\n"  # of the command itself, and of the program


def test_a_python_of_another_environment_runs_as_it_would_by_itself(tmp_path: Path, provider: Provider) -> None:
    """Where the program's environment is the only one, this says nothing."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('own', flush=True)\n")
    program = """
        import subprocess, sys

        subprocess.run([sys._base_executable, "-c", "print('other')"], check=True)
    """
    done = run(tmp_path, provider, program, PYTHONPATH=str(tmp_path / "own"))
    assert done.stdout == "own\nown\nown\nother\n"
    assert "Error in sitecustomize" not in done.stderr


def test_a_library_is_guarded_that_was_looked_for_or_failed_before_it_was_imported(
    tmp_path: Path, provider: Provider
) -> None:
    program = """
        import importlib.util
        import sys

        assert importlib.util.find_spec("openai") is not None
        sys.modules["httpx"] = None
        try:
            import openai
        except ImportError:
            del sys.modules["httpx"]
        for name in [name for name in sys.modules if name.startswith("openai")]:
            del sys.modules[name]
        import openai

        openai.OpenAI().chat.completions.create(
            model="gpt-4o", max_completion_tokens=500, messages=[{"role": "user", "content": "hello"}]
        )
    """
    done = run(tmp_path, provider, program)
    assert done.returncode == 0, done.stderr
    assert "guarded openai; 1 calls, $0.0075, 0 refused" in done.stderr


def test_what_stands_behind_the_program_is_its_own_and_so_is_a_request_to_end(tmp_path: Path) -> None:
    said = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(60)"
    words = [BURSAR, "run", "--budget", "1 USD", sys.executable, "-c", said, "--store", "mine", "--help"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "['--store', 'mine', '--help']\n"
        running.terminate()
        out, err = running.communicate(timeout=60)  # ends with the program, which has the pipe open too
    assert (running.returncode, out) == (128 + signal.SIGTERM, "")
    assert "nothing was guarded" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "5"), "Write it like"),
        (("--budget", "5 USD", "--store", "memory:"), "ends with the program"),
        (("--store", "sqlite:///x.db"), "Say what holds"),
    ],
)
def test_a_wrong_order_runs_nothing(tmp_path: Path, provider: Provider, options: tuple[str, ...], said: str) -> None:
    done = run(tmp_path, provider, "print('ran')", *options)
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stdout == ""
