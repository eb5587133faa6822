"""Watches over runs: what repeats itself is found, in every wire format; what gets on is left alone."""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bursar.detect import Detectors, Finding, RunWatch, Watchtower
from bursar.detect.steps import Step, asked_for, conversation, last_step

SAMPLE = Path(__file__).parent / "data/detect/runs.jsonl.gz"
STOPS = ("ask", "block", "kill")
# Each was looked at: the model was told to provoke an error that the tool does not have, and asked for the same 11 times.
REAL_LOOPS = {"run-36f09d749c13"}

Turn = tuple[list[tuple[str, Any]], list[str]]  # the calls that an answer asks for, and what they give
Wire = Callable[[list[Turn]], Any]


def chat(turns: list[Turn]) -> list[Any]:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The task."}]
    for at, (calls, results) in enumerate(turns):
        asked = [
            {"id": f"c{at}{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}
            for n, (name, args) in enumerate(calls)
        ]
        messages.append({"role": "assistant", "content": None, "tool_calls": asked})
        messages += [{"role": "tool", "tool_call_id": f"c{at}{n}", "content": one} for n, one in enumerate(results)]
    return messages


def responses(turns: list[Turn]) -> dict[str, Any]:
    items: list[Any] = [{"role": "user", "content": "The task."}]
    for at, (calls, results) in enumerate(turns):
        items.append({"type": "reasoning", "id": f"r{at}", "encrypted_content": f"x{at}", "summary": []})
        items += [
            {"type": "function_call", "call_id": f"c{at}{n}", "name": name, "arguments": json.dumps(args)}
            for n, (name, args) in enumerate(calls)
        ]
        items += [
            {"type": "function_call_output", "call_id": f"c{at}{n}", "output": one} for n, one in enumerate(results)
        ]
    return {"input": items}


def anthropic(turns: list[Turn]) -> dict[str, Any]:
    messages: list[Any] = [{"role": "user", "content": "The task."}]
    for at, (calls, results) in enumerate(turns):
        thought = {"type": "thinking", "thinking": f"try {at}", "signature": f"s{at}"}
        uses = [{"type": "tool_use", "id": f"t{at}{n}", "name": name, "input": a} for n, (name, a) in enumerate(calls)]
        given = [{"type": "tool_result", "tool_use_id": f"t{at}{n}", "content": one} for n, one in enumerate(results)]
        messages += [{"role": "assistant", "content": [thought, *uses]}, {"role": "user", "content": given}]
    return {"messages": messages}


def gemini(turns: list[Turn]) -> dict[str, Any]:
    contents: list[Any] = [{"role": "user", "parts": [{"text": "The task."}]}]
    for calls, results in turns:
        asked = [{"functionCall": {"name": name, "args": args}} for name, args in calls]
        names = [name for name, _ in calls]
        given = [
            {"functionResponse": {"name": name, "response": {"result": one}}}
            for name, one in zip(names, results, strict=True)
        ]
        contents += [{"role": "model", "parts": asked}, {"role": "user", "parts": given}]
    return {"contents": contents}


def bedrock(turns: list[Turn]) -> dict[str, Any]:
    messages: list[Any] = [{"role": "user", "content": [{"text": "The task."}]}]
    for at, (calls, results) in enumerate(turns):
        asked = [{"toolUse": {"toolUseId": f"{at}{n}", "name": name, "input": a}} for n, (name, a) in enumerate(calls)]
        given = [{"toolResult": {"toolUseId": f"{at}{n}", "content": [{"text": o}]}} for n, o in enumerate(results)]
        messages += [{"role": "assistant", "content": asked}, {"role": "user", "content": given}]
    return {"messages": messages}


def langchain(turns: list[Turn]) -> list[Any]:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    messages: list[Any] = [HumanMessage("The task.")]
    for at, (calls, results) in enumerate(turns):
        asked = [{"name": name, "args": args, "id": f"c{at}{n}"} for n, (name, args) in enumerate(calls)]
        messages.append(AIMessage("", tool_calls=asked))
        messages += [ToolMessage(one, tool_call_id=f"c{at}{n}") for n, one in enumerate(results)]
    return messages


def go(turns: list[Turn], wire: Wire = chat, watch: RunWatch | None = None) -> tuple[int, Finding] | None:
    """Run an agent with these turns; at which model call it is stopped, and why."""
    watch = watch or RunWatch()
    for at in range(len(turns) + 1):
        finding = watch.model_called(str(at), wire(turns[:at]), at)
        if finding is not None:
            return at, finding
        watch.model_answered(str(at))
    return None


def turn(name: str, result: str, **arguments: Any) -> Turn:
    return [(name, arguments)], [result]


# -- loops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [chat, responses, anthropic, gemini, bedrock, langchain])
def test_the_same_call_with_the_same_result_is_a_loop_in_every_wire_format(wire: Wire) -> None:
    if wire is langchain:
        pytest.importorskip("langchain_core")
    looping = [turn("search", "nothing found", query="a thing", at=n) for n in range(12)]
    stopped = go([turn("plan", "begin"), *looping], wire)
    assert stopped is not None
    at, finding = stopped
    assert (at, finding.detector, finding.repetitions, finding.period) == (5, "loop", 3, 1)
    assert (finding.cause, finding.action) == ("ambiguous termination", "block")
    assert "(search) came again 3 times" in finding.why


@pytest.mark.parametrize("period", [2, 3, 8, 20])
def test_rounds_of_up_to_twenty_steps_are_found_in_their_second_repetition(period: int) -> None:
    names = [f"{chr(97 + n)}_tool" for n in range(period)]
    turns = [turn(names[n % period], f"result of {n % period}", value="x" * (n % period)) for n in range(4 * period)]
    stopped = go(turns, watch=RunWatch(Detectors(stale="off")))
    assert stopped is not None
    at, finding = stopped
    assert finding.period == period
    assert 2 * period < at <= 3 * period


def test_an_answer_is_seen_before_its_tools_are_called_again() -> None:
    watch = RunWatch()
    turns = [turn("search", "nothing", query="a thing")] * 4
    for at in range(4):
        assert watch.model_called(str(at), chat(turns[:at]), at) is None
        message = chat([turns[at]])[-2]
        finding = watch.model_answered(str(at), {"choices": [{"message": message}]})
        assert (finding is not None) == (at == 3)
    assert watch.tool_called("search", {"query": "a thing"}) is not None


def test_a_conversation_that_the_provider_keeps_is_known_from_its_answers() -> None:
    watch = RunWatch()
    call = {"type": "function_call", "call_id": "c", "name": "search", "arguments": '{"query":"a thing"}'}
    given = {"input": [{"type": "function_call_output", "call_id": "c", "output": "nothing"}]}
    found = []
    for at in range(6):
        found.append(watch.model_called(str(at), given if at else {"input": "The task."}, at))
        watch.model_answered(str(at), {"output": [{"type": "reasoning", "summary": []}, call]})
    assert [finding is not None for finding in found] == [False] * 4 + [True] * 2


def test_tools_alone_are_watched_too() -> None:
    watch = RunWatch()
    found = [watch.tool_called("crawl", {"url": "https://example.com"}) for _ in range(6)]
    assert [finding is not None for finding in found] == [False] * 3 + [True] * 3


def test_a_task_given_again_and_again_is_a_loop() -> None:
    watch = RunWatch()
    answer = {"choices": [{"message": {"role": "assistant", "content": "I cannot do that."}}]}
    found = []
    for at in range(6):
        found.append(watch.model_called(str(at), "Do it.", at))
        found.append(watch.model_answered(str(at), answer) if found[-1] is None else None)
    assert any(found)
    assert not any(found[:6])


def test_a_trimmed_history_hides_no_loop() -> None:
    turns = [turn("search", "nothing", query="a thing")] * 8
    watch, found = RunWatch(), []
    for at in range(8):
        found.append(watch.model_called(str(at), chat(turns[:at])[-4:], at))
        watch.model_answered(str(at))
    assert [finding is not None for finding in found] == [False] * 4 + [True] * 4


def test_parallel_agents_do_not_hide_each_others_loops() -> None:
    watch, found = RunWatch(), []
    for at in range(8):
        for agent in ("one", "two", "three"):
            turns = [turn("search", "nothing", query=f"{agent} thing")] * at
            if agent == "two":
                turns = [turn("read", f"page {n} of a long book", page=n) for n in range(at)]
            messages = [{"role": "user", "content": f"You are {agent}."}, *chat(turns)[2:]]
            found.append((agent, watch.model_called(f"{at}{agent}", messages, at)))
            watch.model_answered(f"{at}{agent}")
    assert {agent for agent, finding in found if finding} == {"one", "three"}


def test_results_that_hardly_differ_take_three_times_as_long() -> None:
    noise = "The service is not available at this time. Please try again later. (request {:x}{:x}, busy)"
    rng = random.Random(time.time_ns())
    turns = [turn("fetch", noise.format(rng.randrange(16), rng.randrange(16)), url="/report") for _ in range(14)]
    stopped = go(turns)
    assert stopped is not None
    assert stopped[0] == 10
    assert stopped[1].repetitions == 9


def test_the_very_same_call_is_bounded_whatever_it_gives() -> None:
    turns = [turn("roll", f"{n * 7919:x} " * 20, sides=6) for n in range(40)]
    stopped = go(turns)
    assert stopped is not None
    assert stopped[0] == 31


def test_an_irregular_loop_brings_nothing_new() -> None:
    rng = random.Random(4)
    turns = [turn(f"tool_{n}", f"the result of {n}", value=n) for n in (rng.randrange(5) for _ in range(60))]
    stopped = go(turns)
    assert stopped is not None
    assert stopped[1].detector in ("stale", "loop")
    assert stopped[1].repetitions >= 2


def test_a_growing_context_without_progress_is_told() -> None:
    watch, found = RunWatch(Detectors(loops="off")), []
    for at in range(14):
        turns = [turn("search", "nothing", query="a thing")] * at
        found.append(watch.model_called(str(at), chat(turns), at, input_tokens=1_000 + 100 * at))
        watch.model_answered(str(at))
    assert not any(found[:9])
    assert found[9] is not None
    assert (found[9].detector, found[9].action) == ("context", "notify")
    assert "1100 to 1900" in found[9].why


def test_answers_are_read_as_the_sdks_give_them() -> None:
    from anthropic.types import Message
    from langchain_core.messages import AIMessage
    from openai.types.chat import ChatCompletion
    from openai.types.responses import ResponseFunctionToolCall

    asked, arguments = {"query": "a thing"}, '{"query":"a thing"}'
    call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": arguments}}
    message = {"role": "assistant", "content": "Let me look.", "tool_calls": [call]}
    words = {"type": "text", "text": "Let me look."}
    use = {"type": "tool_use", "id": "t", "name": "search", "input": asked}
    parts = {"parts": [{"text": "Let me look."}, {"function_call": {"name": "search", "args": asked}}], "role": "model"}
    answers = [
        ChatCompletion.model_validate(
            {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            | {"choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}]}
        ),
        Message.model_validate(
            {"id": "1", "type": "message", "role": "assistant", "model": "m", "content": [words, use]}
            | {"stop_reason": "tool_use", "usage": {"input_tokens": 1, "output_tokens": 1}}
        ),
        {"candidates": [{"content": parts}]},
        AIMessage("Let me look.", tool_calls=[{"name": "search", "args": asked, "id": "c"}]),
        SimpleNamespace(message=SimpleNamespace(role="assistant", content="Let me look.", tool_calls=[call])),
        {"output": [ResponseFunctionToolCall(type="function_call", call_id="c", name="search", arguments=arguments)]},
        {"output": {"message": {"role": "assistant", "content": [{"toolUse": {"name": "search", "input": asked}}]}}},
        {"message": message},
    ]
    assert [asked_for(answer) for answer in answers] == [(("search", arguments),)] * len(answers)
    assert asked_for({"choices": [{"text": "Just words."}]}) == (("", "Just words."),)


# -- what is no loop ---------------------------------------------------------------------------------------------------

WORDS = [
    *(
        "apple",
        "river",
        "stone",
        "cloud",
        "engine",
        "paper",
        "window",
        "garden",
        "silver",
        "market",
        "copper",
        "valley",
    ),
    *("anchor", "candle"),
]


@pytest.mark.parametrize(
    "turns",
    [
        [turn("search", f"{WORDS[n % 14] * 3} and {WORDS[n * 5 % 14]} ({n})", query="x", page=n) for n in range(40)],
        [turn("read_file", f"def {WORDS[n % 14]}(): return {n}", path=f"src/{WORDS[n % 14]}.py") for n in range(14)],
        [turn("job_status", f"{WORDS[n]} step is running", job="j1") for n in range(12)],
        [turn("close_ticket", "ok", id=WORDS[n]) for n in range(14)],
        [turn("update_row", '{"status": "updated"}', id=n, text=WORDS[n]) for n in range(8)],
        [
            each
            for n in range(12)
            for each in (
                turn("edit", f"changed {WORDS[n]}", old=WORDS[n], new=WORDS[n + 1]),
                turn("test", "1 failed"),
            )
        ],
        [turn("retry_once", "busy", id=1)] * 3 + [turn("other", "fine")],
        [([("weather", {"city": word}) for word in WORDS[:6]], ["sunny"] * 6)],
    ],
    ids=["pages", "files", "progress", "acknowledged", "rows", "edit and test", "three times", "parallel"],
)
def test_work_that_gets_on_is_left_alone(turns: list[Turn]) -> None:
    assert go(turns) is None


def test_samples_and_further_attempts_are_no_steps() -> None:
    watch = RunWatch()
    request = chat([turn("search", "nothing", query="a thing")])
    for at in range(12):  # at once
        assert watch.model_called(str(at), request, 0) is None
    for at in range(12):
        assert watch.model_answered(str(at)) is None
    watch = RunWatch(Detectors(max_attempts=50))
    now_us = 0
    for at in range(12):  # one after the other, each failed
        assert watch.model_called(str(at), request, now_us) is None
        now_us += watch.model_failed(str(at), now_us)


def test_agents_with_one_task_at_the_same_time_are_no_loop() -> None:
    watch = RunWatch()
    work = [turn("search", "a first thing", query="a thing"), turn("read", "what it says", id=7)]
    for at in range(3):
        for agent in range(6):
            assert watch.model_called(f"{at} {agent}", chat(work[:at]), at) is None
        for agent in range(6):
            assert watch.model_answered(f"{at} {agent}") is None
    for agent in range(6):  # the last ones one after the other
        assert watch.model_called(f"3 {agent}", chat([*work, turn("write", "a report", id=7)]), 3) is None
        assert watch.model_answered(f"3 {agent}") is None


def test_words_put_into_the_models_mouth_are_no_answer() -> None:
    watch = RunWatch()
    for at in range(8):
        request = [{"role": "user", "content": f"Sort {WORDS[at]}."}, {"role": "assistant", "content": "{"}]
        assert watch.model_called(str(at), request, at) is None
        assert watch.model_answered(str(at), {"content": [{"type": "text", "text": f'"kind": {at}'}]}) is None


# -- recorded runs -----------------------------------------------------------------------------------------------------


def recorded() -> list[dict[str, Any]]:
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_recorded_runs_are_flagged_only_where_they_loop() -> None:
    for run in recorded():
        watch, found = RunWatch(), []
        for at, one in enumerate(run["exchanges"]):
            found.append(
                watch.model_called(
                    str(at), one["request"], at, model=one["model"], input_tokens=one["input_tokens"] or 0
                )
            )
            if found[-1] is None:
                found.append(watch.model_answered(str(at), one["answer"]))
        loops = run["run_id"] in REAL_LOOPS or len(run["exchanges"]) == 50
        assert any(found) == loops, f"{run['run_id']} of {run['source']}: {next(filter(None, found), None)}"


def edited(text: str, count: int, rng: random.Random) -> str:
    signs = list(text)
    for at in rng.sample(range(len(signs)), count):
        signs[at] = rng.choice(["", rng.choice("abcdefghij 0123456789"), signs[at] + "x"])
    return "".join(signs)


def repeated(steps: list[Step], share: float, rng: random.Random) -> Iterator[Turn]:
    while True:
        for step in steps:
            calls = [(name, edited(text, round(share * len(text)), rng) if name else text) for name, text in step.calls]
            yield calls, list(step.results)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1])
def test_recorded_runs_made_into_loops_are_stopped_within_three_repetitions(share: float) -> None:
    seed = time.time_ns()
    rng = random.Random(seed)
    ends = []
    for run in rng.sample([run for run in recorded() if len(run["exchanges"]) < 10], 40):
        read = [last_step(conversation(one["request"]))[0] for one in run["exchanges"]]
        steps = [step for step in read if step is not None and step.calls and step.calls[0][0]]
        if not steps:
            continue
        period = rng.randint(1, len(steps))
        more = repeated(steps[-period:], share, rng)
        turns = [(list(step.calls), list(step.results)) for step in steps] + [next(more) for _ in range(3 * period)]
        stopped = go(turns)
        ends.append(stopped is not None and stopped[1].action in STOPS)
    assert len(ends) > 20
    assert sum(ends) >= 0.9 * len(ends), f"seed {seed}: {sum(ends)} of {len(ends)} were stopped"


# -- the rest of the promise -------------------------------------------------------------------------------------------


def test_the_same_request_stays_stopped_until_it_is_forgiven() -> None:
    watch = RunWatch()
    turns = [turn("search", "nothing", query="a thing")] * 4
    stopped = go(turns, watch=watch)
    assert stopped is not None
    for at in range(5):
        assert watch.model_called(f"again {at}", chat(turns), at) == stopped[1]
    watch.forgive()
    assert watch.model_called("approved", chat(turns), 9) is None


def test_steps_and_time_of_a_run_have_limits_where_set() -> None:
    watch = RunWatch(Detectors(max_steps=3, max_minutes=10))
    work = [turn("read", WORDS[n], path=WORDS[n]) for n in range(5)]
    found = [watch.model_called(str(at), chat(work[:at]), 1) for at in range(4)]
    assert [finding.detector if finding else None for finding in found] == [None, None, None, "steps"]
    watch = RunWatch(Detectors(max_minutes=10, limits="kill"))
    assert watch.model_called("1", chat([]), 1) is None
    late = watch.model_called("2", chat(work[:1]), 1 + 600_000_000)
    assert late is not None
    assert (late.detector, late.action) == ("time", "kill")


def test_a_detector_that_is_off_says_nothing() -> None:
    off = Detectors(loops="off", stale="off", context="off")
    assert go([turn("search", "nothing", query="a thing")] * 40, watch=RunWatch(off)) is None


@pytest.mark.parametrize(
    "request_",
    [None, "", [], {}, [None], [[]], {"messages": None}, {"messages": [3, {"role": 4, "content": {"a": object()}}]},
     [{"role": "assistant", "tool_calls": [{"function": None}, 7]}, {"role": "tool"}], [SimpleNamespace(a=1)],
     {"contents": [{"role": "model", "parts": [{"functionCall": {}}, None]}]}],
)  # fmt: skip
def test_a_watch_never_ends_the_call_it_looks_at(request_: Any) -> None:
    watch = RunWatch()
    for at in range(3):
        assert watch.model_called(str(at), request_, at) is None
        assert watch.model_answered(str(at), request_) is None
        assert watch.tool_called("any", request_) is None
    assert watch.model_failed("unknown", 0) == 0


def test_memory_of_a_watch_is_bounded() -> None:
    rng = random.Random(1)

    def fresh(at: int) -> list[Any]:
        word = f"{rng.getrandbits(4000):x}"
        return chat([turn(f"tool_{at}", word, text=word)])

    watch = RunWatch()
    tracemalloc.start()
    try:
        for at in range(300):
            watch.model_called(str(at), fresh(at), at)  # none of them ends
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < 500_000


def test_a_tower_keeps_one_watch_per_run_and_is_bounded() -> None:
    tower = Watchtower()
    first = tower.run("r-1")
    found: list[RunWatch] = []
    threads = [threading.Thread(target=lambda: found.append(tower.run("r-1"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one is first for one in found)
    for at in range(2_000):
        tower.run(f"other {at}")
    assert tower.run("r-1") is not first
    assert tower.connection("openai") is tower.connection("openai")
    assert tower.spender("agent planner") is tower.spender("agent planner")
