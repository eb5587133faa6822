"""Detectors on recorded agent runs: which are flagged, how many runs made into loops are stopped, and what a look costs.

    python bench/bench_detect.py FOLDER [SEED]

FOLDER holds responses.jsonl.gz and runs.jsonl.gz. Each run is told to a watch as the guard tells it: its recorded
requests and answers, in order. For the loops, the last 1 to 8 steps of a run are repeated, with their results, and with
edits of their arguments that are drawn anew from the seed (taken from the clock where none is given).
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from measure import at_least, at_most, table

from bursar.detect import Finding, RunWatch
from bursar.detect.steps import Step, asked_for, conversation, last_step

STOPS = ("ask", "block", "kill")
SECOND = 1_000_000
REPEATED = 50  # the runs that are known to repeat one call this often
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "
MUTATIONS = 10  # loops made of each run


class Exchange(NamedTuple):
    """One recorded call: the wire request, and the answer where it is whole."""

    model: str
    request: Any
    answer: Any
    input_tokens: int


class Run(NamedTuple):
    """A recorded run whose calls are linked."""

    id: str
    source: str
    exchanges: list[Exchange]


def read(folder: Path) -> list[Run]:
    """The runs of the corpus that are one chain, with their exchanges."""
    with gzip.open(folder / "responses.jsonl.gz", "rt", encoding="utf-8") as lines:
        kept = {row["id"]: row for row in map(json.loads, lines)}
    with gzip.open(folder / "runs.jsonl.gz", "rt", encoding="utf-8") as lines:
        runs = [run for run in map(json.loads, lines) if run["linked"] == "chain"]
    return [
        Run(run["run_id"], run["source"], [_exchange(kept[step["id"]]) for step in run["steps"] if not step.get("aux")])
        for run in runs
    ]


def _exchange(row: dict[str, Any]) -> Exchange:
    answer = row["response"] if isinstance(row["response"], dict) and "events" not in row["response"] else None
    tokens = (row.get("usage_norm") or {}).get("input_tokens", 0)
    return Exchange(row.get("model") or "", row["request"].get("body"), answer, tokens)


def tell(one: RunWatch, exchanges: list[Exchange]) -> list[tuple[int, Finding]]:
    """Tell a watch of a run, as the guard does; what it finds: (number of the call, finding)."""
    found = []
    for at, exchange in enumerate(exchanges):
        called = one.model_called(
            str(at), exchange.request, at * SECOND, model=exchange.model, input_tokens=exchange.input_tokens
        )
        answered = None if called and called.action in STOPS else one.model_answered(str(at), exchange.answer)
        found += [(at, finding) for finding in (called, answered) if finding is not None]
    return found


def longest_repeat(run: Run) -> int:
    """How many answers in a row ask for the very same, found without the detectors."""
    asked = [asked_for(exchange.answer) for exchange in run.exchanges if exchange.answer is not None]
    most = count = 1
    for before, after in pairwise(asked):
        count = count + 1 if before == after and after and after[0][0] else 1
        most = max(most, count)
    return most


# -- loops -------------------------------------------------------------------------------------------------------------


def steps_of(run: Run) -> list[Step]:
    """The steps of a run, read from its requests, and its last answer."""
    steps: list[Step] = []
    for exchange in run.exchanges:
        step = last_step(conversation(exchange.request))[0] if isinstance(exchange.request, dict) else None
        if step is not None and step.calls:
            steps.append(step)
    last = run.exchanges[-1].answer
    if last is not None and (asked := asked_for(last)):
        steps.append(Step(asked, ("Go on.",), 0))
    return steps


def few(text: str, rng: random.Random) -> str:
    """One or two characters of the text changed, or its first number counted up."""
    digits = [at for at, sign in enumerate(text) if sign.isdigit() and sign != "9"]
    if digits and rng.random() < 0.5:
        return text[: digits[0]] + str(int(text[digits[0]]) + 1) + text[digits[0] + 1 :]
    return _edited(text, min(rng.randint(1, 2), len(text) // 4), rng)


def tenth(text: str, rng: random.Random) -> str:
    """A tenth of the characters replaced, put in or taken out, anywhere in the text."""
    return _edited(text, round(len(text) / 10), rng)


def none(text: str, _: random.Random) -> str:
    """The text as it is."""
    return text


def _edited(text: str, count: int, rng: random.Random) -> str:
    signs = list(text)
    for at in sorted(rng.sample(range(len(signs)), count), reverse=True):
        draw = rng.random()
        signs[at : at + 1] = (
            [] if draw < 0.2 else [rng.choice(LETTERS)] if draw < 0.8 else [signs[at], rng.choice(LETTERS)]
        )
    return "".join(signs)


def looped(
    steps: list[Step], period: int, edit: Callable[[str, random.Random], str], rng: random.Random
) -> Iterator[Step]:
    """The last steps again and again; edits start anew from the first round, or add up."""
    first = part = steps[-period:]
    add_up = rng.random() < 0.5
    while True:
        part = [
            step._replace(calls=tuple((name, edit(text, rng) if name else text) for name, text in step.calls))
            for step in (part if add_up else first)
        ]
        yield from part


def stopped_after(steps: list[Step], period: int, more: Iterator[Step], *, tell_answers: bool) -> int | None:
    """The repetition in which the loop is stopped, at most 20; 0 for one that is stopped before it loops."""
    one = RunWatch()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "The task."}]
    for at in range(len(steps) + 20 * period):
        step = steps[at] if at < len(steps) else next(more)
        finding = one.model_called(str(at), messages, at * SECOND)
        repetition = 0 if at < len(steps) else (at - len(steps)) // period + 1
        if finding is not None and finding.action in STOPS:  # the step of `at` is not made any more
            return repetition if at <= len(steps) or (at - len(steps)) % period else repetition - 1
        answer = _chat_answer(step, at)
        finding = one.model_answered(str(at), {"choices": [{"message": answer}]} if tell_answers else None)
        if finding is not None and finding.action in STOPS:
            return repetition
        messages = [*messages, answer, *_chat_results(step, at)]
    return None


def _chat_answer(step: Step, at: int) -> dict[str, Any]:
    if not step.calls[0][0]:
        return {"role": "assistant", "content": step.calls[0][1]}
    calls = [
        {"id": f"call_{at}_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(step.calls)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _chat_results(step: Step, at: int) -> list[dict[str, Any]]:
    if not step.calls[0][0]:
        return [{"role": "user", "content": result} for result in step.results]
    return [
        {"role": "tool", "tool_call_id": f"call_{at}_{index}", "content": result}
        for index, result in enumerate(step.results)
    ]


# -- tables ------------------------------------------------------------------------------------------------------------


def print_flagged(runs: list[Run]) -> list[Run]:
    """Which recorded runs are flagged; gives those that are not."""
    found = {run.id: tell(RunWatch(), run.exchanges) for run in runs}
    known = [run for run in runs if longest_repeat(run) > 0.8 * REPEATED]
    others = [run for run in runs if run not in known]
    flagged = [run for run in others if found[run.id]]
    seen = sum(bool(found[run.id]) for run in known)
    share = 100 * len(flagged) / max(1, len(others))
    table(
        "Recorded chained runs, default settings",
        ("runs", "count", "flagged", "goal"),
        (
            (f"that repeat one call {REPEATED} times", len(known), seen, at_least(seen, len(known))),
            ("others", len(others), f"{len(flagged)} ({share:.2f} %)", at_most(share, 1, " %")),
        ),
    )
    table(
        "The others that were flagged",
        ("run", "calls", "from", "at call", "why"),
        [(run.id, len(run.exchanges), run.source, found[run.id][0][0] + 1, found[run.id][0][1].why) for run in flagged],
    )
    return [run for run in others if run not in flagged]


def print_loops(runs: list[Run], seed: int) -> None:
    """How many of the runs are stopped once they are made into loops."""
    read_out = [steps for steps in map(steps_of, runs) if steps and any(step.calls[0][0] for step in steps)]
    rows = []
    for name, edit, goal in (
        ("none", none, 99),
        ("1 or 2 characters, or a count", few, 99),
        ("10 % of the characters", tenth, 95),
    ):
        for told in (True, False):
            rng = random.Random(f"{seed} {name}")
            ends = []
            for steps in read_out:
                for _ in range(MUTATIONS):
                    period = rng.randint(1, min(8, len(steps)))
                    ends.append(stopped_after(steps, period, looped(steps, period, edit, rng), tell_answers=told))
            share = 100 * sum(end is not None and end <= 3 for end in ends) / max(1, len(ends))
            later = sum(end is not None and end > 3 for end in ends)
            rows.append(
                (name, "answers too" if told else "requests only", len(ends), f"{share:.2f} %", later, ends.count(None),
                 at_least(share, goal, " %"))
            )  # fmt: skip
    table(
        f"{len(read_out)} runs made into loops, {MUTATIONS} times each, seed {seed}",
        ("edits of the arguments", "told", "loops", "stopped within 3 repetitions", "later", "never", "goal"),
        rows,
    )


def print_cost(runs: list[Run]) -> None:
    """What an event costs, and what a watch keeps. The least of many rounds: other work on the machine only adds."""
    text = "The weather in Paris is sunny, 21 degrees, with a light wind from the west. " * 4
    fresh: list[Exchange] = []
    messages: list[dict[str, Any]] = [{"role": "user", "content": "The task."}]
    for at in range(60):
        asked = json.dumps({"query": f"weather {at} {chr(97 + at % 26)}", "limit": 10})
        step = Step((("search", asked),), (f"{at} {text}",), 0)
        answer = _chat_answer(step, at)
        fresh.append(Exchange("", {"messages": messages}, {"choices": [{"message": answer}]}, 0))
        messages = [*messages, answer, *_chat_results(step, at)]
    long = max(runs, key=lambda run: len(run.exchanges)).exchanges
    costs = [
        (f"one event, {name} of {len(run)} calls", _least_us(run) / 2 / len(run))
        for name, run in (("an agent that gets on,", fresh), ("the longest recorded run", long))
    ]
    tracemalloc.start()
    watches = [RunWatch() for _ in range(20)]
    for one in watches:
        tell(one, fresh)
    kept = tracemalloc.get_traced_memory()[0] / len(watches) / 1_000
    tracemalloc.stop()
    rows = [(name, f"{cost:.1f} us", at_most(cost, 20, " us")) for name, cost in costs]
    table(
        "Cost",
        ("what", "figure", "goal"),
        [*rows, (f"memory of one watch after {len(fresh)} calls", f"{kept:.1f} kB", "")],
    )


def _least_us(exchanges: list[Exchange]) -> float:
    times = []
    for _ in range(60):
        begun = time.perf_counter_ns()
        tell(RunWatch(), exchanges)
        times.append(time.perf_counter_ns() - begun)
    return min(times) / 1_000


def main(folder: Path, seed: int) -> None:
    """Print all tables."""
    runs = read(folder)
    print_loops(print_flagged(runs), seed)
    print_cost(runs)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Give the folder that holds responses.jsonl.gz and runs.jsonl.gz.")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns())
