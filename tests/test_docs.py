"""Every code block of the README and the documentation does what it says: it is run."""

from __future__ import annotations

import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "packages/*/README.md")
    for page in sorted(ROOT.glob(pattern))
]
# A framework with an environment of its own has a page of its own, and its blocks run there.
APART = {"crewai", "litellm", "llamaindex"}
PAGES = [page for page in PAGES if page.stem not in APART or find_spec(f"bursar_{page.stem}") is not None]
BURSAR = str(Path(sysconfig.get_path("scripts")) / "bursar")
# Commands about the environment: whoever runs this test has run them already.
ENVIRONMENT = ("python -m pip install ", "pip install ", "uv add ", "uv run nox ")
TIMEOUT_S = 120


def run_bursar(*words: str) -> None:
    """Run the installed command; it must exit with 0."""
    done = subprocess.run([BURSAR, *words], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"bursar {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


def console(example: Example) -> None:
    """Lines after `$ ` are commands; what stands between them is what they print, and is not compared."""
    for line in example.parsed.splitlines():
        if line.startswith("$ ") and not line.startswith(tuple(f"$ {command}" for command in ENVIRONMENT)):
            program, *words = shlex.split(line.removeprefix("$ "), comments=True)
            assert program == "bursar", f"nothing runs `{line}`: show a bursar command, or Python"
            run_bursar(*words)


def policy(example: Example) -> None:
    """A policy passes the check, and stays as the file that later blocks of the page load."""
    path = Path(f"bursar.{example.region.lexemes['language'].split()[0]}")
    path.write_text(example.parsed)
    run_bursar("policy", "check", path.name)


def shown(example: Example) -> None:
    """Output, or data: there is nothing to run."""


EVALUATORS: dict[str, Callable[[Example], str | None]] = {
    "python": PythonEvaluator(),
    "console": console,
    "toml policy": policy,
    "yaml policy": policy,
    **dict.fromkeys(["text", "json", "sql", "toml", "yaml", "mermaid"], shown),
}


def blocks(document: Document) -> Iterable[Region]:
    """Every fenced block, with what runs it; a language that nothing runs is an error, so that no block slips by."""
    for region in FencedCodeBlockLexer(language=".*")(document):
        language = region.lexemes["language"].strip()
        if language not in EVALUATORS:
            where = f"{document.path}, {document.line_column(region.start)}"
            raise AssertionError(f"{where}: no test runs {language!r}; use one of {list(EVALUATORS)}")
        region.parsed, region.evaluator = region.lexemes["source"], EVALUATORS[language]
        yield region


def run_page(page: Path) -> int:
    """Run the blocks of a page in order, in one namespace; say how many there were."""
    document = Sybil(parsers=[blocks]).parse(page)
    document.namespace["__name__"] = page.stem  # classes that a page defines belong to a module, as in a program
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    return len(examples)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, without settings of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BURSAR_STORE", raising=False)
    return tmp_path


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local provider behind every client that a page makes."""
    from bursar.testing.provider import Answer, Provider

    with Provider(Answer(input_tokens=1_000, output_tokens=500)) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{running.url}/v1")
        monkeypatch.setenv("OPENAI_API_BASE", f"{running.url}/v1")  # what LlamaIndex asks for
        monkeypatch.setenv("ANTHROPIC_BASE_URL", running.url)
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", running.url)
        for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
            monkeypatch.setenv(name, "local")
        yield


@pytest.mark.usefixtures("desk", "provider")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path) -> None:
    run_page(page)


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("```python\nassert 1 == 2, 'planted'\n```", "planted"),
        ("```console\n$ bursar no-such-command\n```", "No such command"),
        ("```console\n$ rm -r /no/such/folder\n```", "nothing runs"),
        ("```toml policy\nno_such_key = 1\n```", "no_such_key"),
        ("```bash\nbursar status\n```", "no test runs 'bash'"),
        ("```\nbursar status\n```", "no test runs ''"),
    ],
)
def test_a_planted_wrong_block_is_found(block: str, complaint: str, desk: Path) -> None:
    page = desk / "page.md"
    page.write_text(f"# A page\n\n{block}\n")
    with pytest.raises(AssertionError, match=complaint):
        run_page(page)


def test_blocks_of_a_page_share_names_in_order(desk: Path) -> None:
    page = desk / "page.md"
    page.write_text("```python\nseen = [1]\n```\n\n- in a list:\n\n  ```python\n  seen.append(2)\n  ```\n\n"
                    "```python\nfrom pathlib import Path\nPath('seen').write_text(str(seen))\n```\n")  # fmt: skip
    assert run_page(page) == 3
    assert (desk / "seen").read_text() == "[1, 2]"
