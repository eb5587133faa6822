"""What the tests of the CrewAI adapter share: real clients and crews, without telemetry, network or files left behind."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# CrewAI keeps the outputs of tasks in a file, with an fsync each: in memory, where the system has such a folder.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# Before crewai is imported: it would report itself, and ask for traces.
os.environ.update(
    CREWAI_DISABLE_TELEMETRY="true",
    CREWAI_DISABLE_TRACKING="true",
    CREWAI_TRACING_ENABLED="false",
    OTEL_SDK_DISABLED="true",
    DEFER_PYDANTIC_BUILD="false",  # of OpenAI's SDK: at the first call it can fail, where threads make it together
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    SSL_CERT_FILE="",  # each client would read all certificates of the system, 17 ms, for a provider that speaks HTTP
    SSL_CERT_DIR=os.path.dirname(__file__),
    OPENAI_API_KEY="replayed",
    ANTHROPIC_API_KEY="replayed",
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY, ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("CREWAI_STORAGE_DIR", folder)
        yield


@pytest.fixture
def forks() -> Any:
    """A context of `multiprocessing` whose processes start at once: they are forks of one that has imported CrewAI."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crewai", "pytest"])
    return context


@pytest.fixture
def client() -> Callable[..., Any]:
    """client(url, **options): CrewAI's LLM for this URL, without retries of its SDK."""
    from crewai import LLM

    def make(url: str, *, model: str = "gpt-4o", max_retries: int = 0, max_tokens: int = 500, **options: Any) -> Any:
        base_url = url if model.startswith("anthropic/") else f"{url}/v1"
        settings = {"base_url": base_url, "api_key": "replayed", "max_retries": max_retries, "max_tokens": max_tokens}
        return LLM(model=model, **settings, **options)

    return make


@pytest.fixture
def crew() -> Callable[..., Any]:
    """crew(llm, *tools, do="do it", tasks=1, **options): a crew of the agent `planner`, who does all tasks."""
    from crewai import Agent, Crew, Task

    def make(llm: Any, *tools: Any, do: str = "do it", tasks: int = 1, **options: Any) -> Any:
        planner = Agent(role="planner", goal="g", backstory="b", llm=llm, tools=list(tools))
        todo = [Task(description=do, expected_output="e", agent=planner) for _ in range(tasks)]
        return Crew(agents=[planner], tasks=todo, **options)

    return make


@pytest.fixture
def search() -> Any:
    """A tool that finds nothing, and remembers in `search.ran` what it was asked."""
    from crewai.tools import BaseTool

    class Search(BaseTool):
        name: str = "search"
        description: str = "Search the web."
        ran: list[str] = []  # noqa: RUF012 - a field of a pydantic model, copied for each object

        def _run(self, query: str) -> str:
            self.ran.append(query)
            return "nothing"

    return Search()
