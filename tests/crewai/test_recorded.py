"""Recorded crews, driven by CrewAI's own loop: the ledger is the provider's account, to the nano-dollar."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bursar_crewai")

from crewai.tools import BaseTool
from pydantic import BaseModel, ConfigDict, create_model

from bursar import Budget, Bursar
from bursar.testing.provider import Provider, Rates
from bursar_crewai import BursarCrew

with gzip.open(Path(__file__).parents[1] / "data" / "crewai" / "runs.jsonl.gz", "rt", encoding="utf-8") as lines:
    RUNS = [json.loads(line) for line in lines]
RATES = {
    "gpt-4o": Rates(input_nanos=2_500, output_nanos=10_000, cache_read_nanos=1_250),
    "gpt-4o-mini": Rates(input_nanos=150, output_nanos=600, cache_read_nanos=Fraction(75)),
    "gpt-4.1-nano": Rates(input_nanos=100, output_nanos=400, cache_read_nanos=25),
}


class Anything(BaseModel):
    """What a tool is given: the recorded arguments, whatever they are."""

    model_config = ConfigDict(extra="allow")


def tools_of(steps: list[dict[str, Any]]) -> list[BaseTool]:
    """A tool for each name that the recorded model calls, natively or in text."""
    written = json.dumps([step["response"] for step in steps])
    names = {tool["function"]["name"] for step in steps for tool in step["request"].get("tools", ())}
    names |= {found.strip() for found in re.findall(r"Action: *([\w ]+?)\s*\\\\?n", written)}

    class Recorded(BaseTool):
        description: str = "As recorded."
        args_schema: type[BaseModel] = create_model("Arguments", __base__=Anything)

        def _run(self, **given: Any) -> str:
            return "as recorded"

    return [Recorded(name=name) for name in sorted(names)]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["id"])
def test_a_recorded_crew_is_booked_as_billed(run: dict[str, Any], client: Callable[..., Any], crew: Any) -> None:
    """Its answers are served in order, in as many tasks as they make; a cut or repeated answer would show as a difference."""
    steps = run["steps"]
    first = steps[0]["request"]
    with (
        Provider.from_run(steps, rates=RATES) as provider,
        Bursar("memory:", [Budget("all", "1 USD")]) as bursar,
        BursarCrew(bursar).scope(),
    ):
        llm = client(provider.url, model=first["model"], stream=bool(first.get("stream")))
        if not first.get("tools"):
            object.__setattr__(llm, "supports_function_calling", lambda: False)
        made = crew(llm, *tools_of(steps))
        for _ in steps:
            if provider.requests < len(steps):
                made.kickoff()
        provider.wait_idle()
        billed = [one.cost_nanos for one in provider.account if one.billed]
        calls = [record for record in bursar.records() if "tool" not in record.tags]
        assert len(billed) == len(steps)
        assert [record.cost_nanos for record in calls if record.cost_nanos] == billed
        assert not any(record.estimated for record in calls)
        assert bursar.store.open_reservations() == 0
