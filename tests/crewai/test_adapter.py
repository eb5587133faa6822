"""The adapter as a package: its version floor, its weight, its example."""

from __future__ import annotations

import logging
import runpy
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bursar_crewai")

from crewai.llms.base_llm import BaseLLM

from bursar import Bursar
from bursar.errors import InvalidInput
from bursar_crewai import install, seams

ROOT = Path(__file__).resolve().parents[2]


def test_a_release_below_the_floor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "1.15.18")
    with pytest.raises(InvalidInput, match=r"Install crewai>=1.15.19"):
        seams._check_release()


def test_a_release_that_has_moved_what_the_guard_stands_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseLLM, "_track_token_usage_internal")
    with pytest.raises(InvalidInput, match="_track_token_usage_internal"):
        seams._check_release()


def test_a_second_guard_for_the_process_is_refused() -> None:
    with Bursar("memory:", []) as first, Bursar("memory:", []) as second:
        uninstall = install(first)
        with pytest.raises(InvalidInput, match="installed already"):
            install(second)
        uninstall()
        install(second)()


def test_importing_the_adapter_adds_little_to_importing_crewai(forks: Any) -> None:
    """At most 50 ms; the fastest of three, because other tests run beside this one."""
    code = (
        "import sys, time\nassert 'crewai' in sys.modules and 'bursar' not in sys.modules\n"
        "start = time.perf_counter()\nimport bursar_crewai\ntold.send(time.perf_counter() - start)"
    )

    def took_s() -> float:
        heard, told = forks.Pipe(duplex=False)
        process = forks.Process(target=exec, args=(code, {"told": told}))
        process.start()
        told.close()
        seconds: float = heard.recv()
        process.join()
        return seconds

    assert min(took_s() for _ in range(3)) < 0.05


@pytest.mark.parametrize("example", sorted((ROOT / "examples" / "crewai").glob("*.py")), ids=lambda path: path.name)
def test_an_example_runs(example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(example)])
    try:
        runpy.run_path(str(example), run_name="__main__")
    finally:
        logging.disable(logging.NOTSET)
    assert "refused the call" in capsys.readouterr().out
