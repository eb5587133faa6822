"""Learned estimates: close from the priors alone, closer within a run, never below what identical calls were billed."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from bursar import Usage
from bursar.errors import UnboundedEstimate
from bursar.estimate import Learner, Request, strict
from bursar.estimate.learned import MAX_BRANCHES, MAX_MODELS, MAX_RUNS, WINDOW, _Window
from bursar.estimate.plain import plain
from bursar.estimate.priors import packaged
from bursar.estimate.request import FEATURES

DATA = Path(__file__).parent / "data" / "estimates"
PRIORS = Path(__import__("bursar.estimate").estimate.__file__).with_name("priors.json")
with gzip.open(DATA / "answers.jsonl.gz", "rt", encoding="utf-8") as lines:
    ANSWERS = {answer["id"]: answer for answer in map(json.loads, lines)}
RUNS = json.loads((DATA / "runs.json").read_text("utf-8"))


def request_of(answer: dict[str, Any]) -> Request:
    return Request(
        answer["provider"], answer["model"] or "", body=answer["request"]["body"], endpoint=answer["endpoint_kind"]
    )


def usage_of(answer: dict[str, Any]) -> Usage:
    counts = answer["usage_norm"]
    return Usage(input_tokens=counts["input_tokens"], output_tokens=counts.get("output_tokens") or 0)


def ask(text: str = "cat " * 1_000, *, max_output_tokens: int | None = 500, model: str = "gpt-4o") -> Request:
    return Request("openai", model, [{"role": "user", "content": text}], max_output_tokens=max_output_tokens)


def test_from_the_priors_alone_few_recorded_answers_exceed_and_the_middle_is_near() -> None:
    ratios = []
    for answer in ANSWERS.values():
        request = request_of(answer)
        if request.kind == "text":
            estimate = Learner().estimate(request, max_output_tokens=1_000)
            ratios.append((estimate.input_tokens / answer["usage_norm"]["input_tokens"], answer))
    assert len(ratios) > 250
    assert sum(ratio < 1 for ratio, _ in ratios) <= 0.02 * len(ratios)
    large = sorted(ratio for ratio, answer in ratios if answer["usage_norm"]["input_tokens"] > 500)
    assert large[len(large) // 2] <= 1.5


def test_within_recorded_runs_the_last_call_tells_the_next() -> None:
    ratios = []
    for run in RUNS:
        learner = Learner()
        for number, identity in enumerate(run):
            answer, request = ANSWERS[identity], request_of(ANSWERS[identity])
            if number and request.kind == "text":
                estimate = learner.estimate(request, run="r", max_output_tokens=1_000)
                ratios.append(estimate.input_tokens / answer["usage_norm"]["input_tokens"])
            learner.observe(request, usage_of(answer), run="r")
    assert len(ratios) > 60
    assert sum(ratio < 1 for ratio in ratios) <= max(1, 0.005 * len(ratios))
    # The sample gives rare product lines, with their short runs, the weight of frequent ones; the bench has the rest.
    assert sorted(ratios)[len(ratios) // 2] <= 1.5


def test_the_packaged_priors_fit_the_features_and_state_their_error() -> None:
    data = json.loads(PRIORS.read_text("utf-8"))
    assert data["features"] == list(FEATURES)
    assert all(len(row["weights"]) == len(FEATURES) for row in data["lines"].values())
    assert "*" in data["lines"]
    assert PRIORS.stat().st_size < 20_000
    assert data["error_held_out"]["exceeded"] <= 0.02
    assert data["error_held_out"]["median_above_500"] <= 1.5
    assert set(packaged().lines) == set(data["lines"])


def test_an_unknown_version_takes_its_family_and_a_stranger_the_widest_line() -> None:
    lines = packaged().lines
    assert packaged().line(ask(model="gpt-9-ultra")) is lines["gpt"]
    assert packaged().line(Request("acme", "wonder-1", "Hi")) is lines["other"]
    assert lines["gpt"].factor > lines["gpt-4"].factor


@given(actual=st.integers(1, 20_000), output=st.integers(0, 499), words=st.integers(1, 3_000), run=st.booleans())
def test_fifty_identical_calls_are_met_within_two_percent_and_never_missed(
    actual: int, output: int, words: int, run: bool
) -> None:
    learner, name = Learner(), "r" if run else None
    request = Request("openai", "gpt-4o", "word " * words, max_output_tokens=500)
    actual = min(actual, strict(request).input_tokens)
    for _ in range(50):
        learner.observe(request, Usage(input_tokens=actual, output_tokens=output), run=name)
    estimate = learner.estimate(request, run=name)
    assert actual <= estimate.input_tokens <= 1.02 * actual + 1
    assert output <= estimate.output_tokens <= 1.02 * output + 1


def test_ten_calls_of_a_thousand_tokens_fit_in_a_budget_for_ten_and_a_half() -> None:
    learner = Learner()
    for _ in range(50):
        learner.observe(ask(), Usage(input_tokens=1_000, output_tokens=500))
    estimate = learner.estimate(ask())
    assert 10_000 <= 10 * estimate.input_tokens <= 10_400
    assert estimate.output_tokens == 500


def test_an_answer_cut_off_at_its_limit_teaches_that_it_may_be_longer() -> None:
    learner = Learner()
    learner.observe(ask(max_output_tokens=100), Usage(input_tokens=1_000, output_tokens=100))
    assert learner.estimate(ask(max_output_tokens=4_096)).output_tokens == 4_096


def test_outputs_shrink_to_what_is_used_and_never_pass_the_maximum() -> None:
    learner, request = Learner(), ask(max_output_tokens=4_096)
    assert learner.estimate(request).output_tokens == 4_096
    learner.observe(request, Usage(input_tokens=1_000, output_tokens=500))
    assert learner.estimate(request).output_tokens == 1_000
    for _ in range(9):
        learner.observe(request, Usage(input_tokens=1_000, output_tokens=500))
    assert learner.estimate(request).output_tokens == 550
    assert learner.estimate(ask(max_output_tokens=200)).output_tokens == 200
    assert learner.estimate(ask(max_output_tokens=None), max_output_tokens=300).output_tokens == 300


def test_answers_are_learned_one_by_one_and_counted_together() -> None:
    learner = Learner()
    request = Request("openai", "gpt-4o", "Hi", max_output_tokens=4_096, n=4)
    for _ in range(64):
        learner.observe(request, Usage(input_tokens=9, output_tokens=400))
    estimate = learner.estimate(request)
    assert (estimate.max_output_tokens, estimate.output_tokens, estimate.answers) == (102, 408, 4)


def test_a_dearer_call_raises_the_estimate_at_once() -> None:
    learner = Learner()
    for tokens in [1_000] * 40 + [1_900]:
        learner.observe(ask(), Usage(input_tokens=tokens, output_tokens=5))
    assert learner.estimate(ask()).input_tokens >= 1_900


def test_a_continued_conversation_costs_the_last_call_and_what_was_added() -> None:
    learner = Learner()
    history = [{"role": "user", "content": "word " * 2_000}]
    learner.observe(Request("openai", "gpt-4o", history), Usage(input_tokens=5_000, output_tokens=20), run="r")
    longer = [*history, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "word " * 100}]
    estimate = learner.estimate(Request("openai", "gpt-4o", longer), run="r", max_output_tokens=100)
    assert estimate.basis == "the run's last call plus what was added"
    assert 5_100 < estimate.input_tokens < 5_700
    other = [{"role": "user", "content": "another"}]
    assert learner.estimate(Request("openai", "gpt-4o", other), run="r", max_output_tokens=9).input_tokens < 200
    assert learner.estimate(Request("openai", "gpt-4o", longer), run="s", max_output_tokens=9).basis != estimate.basis


def test_a_stored_conversation_grows_by_the_last_answer() -> None:
    learner = Learner()

    def turn(last: str | None) -> Request:
        return Request(
            "openai", "gpt-5", body={"input": "Go on", "previous_response_id": last, "max_output_tokens": 99}
        )

    learner.observe(turn("resp_1"), Usage(input_tokens=8_000, output_tokens=700), run="r")
    assert 8_700 < learner.estimate(turn("resp_2"), run="r").input_tokens < 9_500
    assert learner.estimate(turn("resp_2"), run="r", context_window=8_192).input_tokens == 8_192


def test_the_callers_count_is_believed() -> None:
    request = Request("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)
    learner = Learner()
    for _ in range(3):
        learner.observe(request, Usage(input_tokens=1_700, output_tokens=10))
    assert learner.estimate(request).input_tokens == 1_000


def test_without_messages_the_last_calls_tell_else_the_window_else_nothing() -> None:
    learner, request = Learner(), Request("openai", "gpt-4o", max_output_tokens=10)
    with pytest.raises(UnboundedEstimate, match="Give its messages or input_tokens"):
        learner.estimate(request)
    assert learner.estimate(request, context_window=128_000).input_tokens == 128_000
    learner.observe(request, Usage(input_tokens=700, output_tokens=5))
    assert learner.estimate(request, context_window=128_000).input_tokens == 1_400


@given(words=st.integers(0, 400), ratio=st.floats(0.01, 50), calls=st.integers(0, 5))
def test_it_never_passes_the_strict_bound(words: int, ratio: float, calls: int) -> None:
    learner = Learner()
    request = Request("anthropic", "claude-sonnet-4-5", "a " * words, max_output_tokens=10)
    for _ in range(calls):
        learner.observe(request, Usage(input_tokens=max(1, int(request.size * ratio)), output_tokens=1), run="r")
    for run in (None, "r"):
        assert learner.estimate(request, run=run).input_tokens <= strict(request).input_tokens


def test_a_call_that_reported_nothing_teaches_nothing() -> None:
    learner = Learner()
    before = learner.estimate(ask())
    learner.observe(ask(), Usage(input_tokens=0, output_tokens=0))
    assert learner.estimate(ask()) == before


def test_memory_is_bounded_in_models_runs_and_branches() -> None:
    learner = Learner()
    for number in range(MAX_MODELS + 10):
        learner.observe(ask("Hi", model=f"gpt-4-{number}"), Usage(input_tokens=9, output_tokens=9))
    for number in range(MAX_RUNS + 10):
        learner.observe(ask("Hi"), Usage(input_tokens=9, output_tokens=9), run=f"r-{number}")
    for number in range(100):
        learner.observe(ask(f"Hi {number}"), Usage(input_tokens=9, output_tokens=9), run="one")
    assert len(learner._models) == MAX_MODELS
    assert len(learner._runs) == MAX_RUNS
    assert len(learner._runs["one"]) == MAX_BRANCHES


def test_a_run_whose_calls_nothing_can_continue_is_not_remembered() -> None:
    """Their input is the caller's count, or unknown: no estimate looks at the run."""
    learner = Learner()
    for request in (Request("openai", "gpt-4o", input_tokens=9), Request("openai", "gpt-4o")):
        learner.observe(request, Usage(input_tokens=9, output_tokens=9), run="r")
    assert not learner._runs


def test_threads_share_one_learner() -> None:
    learner, failures = Learner(), []

    def work(number: int) -> None:
        try:
            for step in range(200):
                learner.observe(ask("Hi " * step), Usage(input_tokens=step + 1, output_tokens=step), run=f"r-{number}")
                learner.estimate(ask("Hi " * step), run=f"r-{number}")
        except Exception as error:  # noqa: BLE001  (a failure in a thread must reach the test)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, float("inf")]), max_size=4 * WINDOW))
def test_the_dearest_of_the_last_observations_is_known_without_a_look(values: list[float]) -> None:
    window = _Window()
    for number, value in enumerate(values, 1):
        window.add(value)
        last = values[max(0, number - WINDOW) : number]
        assert window.seen == (max(last), len(last))


class _Said(BaseModel):
    content: str = "field"


class _Extra(_Said):
    model_config = ConfigDict(extra="allow")


class _Property(_Said):
    @property
    def name(self) -> str:
        return "property"


class _Late(_Said):
    def __getattr__(self, name: str) -> str:
        if name == "name":
            return "late"
        raise AttributeError(name)


@pytest.mark.parametrize(
    ("said", "name"),
    [(_Said(), None), (_Extra(name="extra"), "extra"), (_Property(), "property"), (_Late(), "late")],  # type: ignore[call-arg]
)
def test_a_message_of_a_framework_is_read_wherever_it_keeps_its_parts(said: BaseModel, name: str | None) -> None:
    assert plain(said) == {"role": "None", "content": "field"} | ({} if name is None else {"name": name})
