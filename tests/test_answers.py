"""The reading of usage: every recorded shape, every form of an answer, cut streams, and hostile input."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.answers import StreamReader, read_usage
from bursar.answers.anthropic import usual_message
from bursar.answers.chat import usual_usage
from bursar.errors import UnreadableAnswer
from bursar.usage import Usage

RECORDED = [
    json.loads(line)
    for line in gzip.decompress((Path(__file__).parent / "data/answers/recorded.jsonl.gz").read_bytes()).splitlines()
]
STREAMS = [row for row in RECORDED if isinstance(row["body"], dict) and "events" in row["body"] and "usage" in row]


def reading(row: dict[str, Any], body: Any) -> dict[str, Any]:
    try:
        usage = read_usage(row["provider"], body, headers=row.get("headers"), status=row["status"])
    except UnreadableAnswer as error:
        return {"reason": error.reason}
    return {"usage": usage.as_dict()}


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: f"{row['provider']}-{row['endpoint_kind']}-{row['id']}")
def test_every_recorded_shape_reads_as_expected(row: dict[str, Any]) -> None:
    assert reading(row, row["body"]) == {name: row[name] for name in ("usage", "reason") if name in row}


# Where Bursar's figure stands against the collector's, by what the answer holds; each was looked at by hand.
def explained(row: dict[str, Any], usage: dict[str, Any]) -> bool:
    body = row["body"]
    text = json.dumps(body)
    return (
        '"iterations"' in text  # rounds outside Anthropic's top level are billed
        or row["endpoint_kind"] == "cachedContents"  # making a cache reads its tokens once
        or (
            row["provider"] == "google-gla" and row["endpoint_kind"] == "chat.completions"
        )  # hidden thoughts are billed
        or (
            row["provider"] == "xai" and usage["cache_read_tokens"] == usage["input_tokens"]
        )  # cached beyond the prompt
    )


@pytest.mark.parametrize(
    "row", [row for row in RECORDED if "usage_norm" in row and "usage" in row], ids=lambda row: row["id"]
)
def test_totals_agree_with_the_collectors_counts(row: dict[str, Any]) -> None:
    norm, usage = row["usage_norm"], row["usage"]
    ours = (usage.get("input_tokens", 0), usage.get("output_tokens", 0))
    assert ours == (norm.get("input_tokens", 0), norm.get("output_tokens", 0)) or explained(row, usage)


@pytest.mark.parametrize("row", STREAMS, ids=lambda row: f"{row['provider']}-{row['endpoint_kind']}-{row['id']}")
def test_a_stream_read_live_equals_its_list_of_events(row: dict[str, Any]) -> None:
    reader = StreamReader(row["provider"])
    for event in row["body"]["events"]:
        reader.feed(event)
    usage = reader.usage()
    assert usage is not None
    assert usage.as_dict() == row["usage"]
    data = [event["data"] for event in row["body"]["events"] if "data" in event]
    if row["body"]["format"] == "sse":
        text = "".join(f"data: {entry if isinstance(entry, str) else json.dumps(entry)}\n\n" for entry in data if entry)
        assert reading(row, text) == {"usage": row["usage"]}
        assert reading(row, text.encode()) == {"usage": row["usage"]}


@pytest.mark.parametrize("row", [row for row in RECORDED if isinstance(row["body"], dict)], ids=lambda row: row["id"])
def test_text_and_bytes_read_as_the_dict_does(row: dict[str, Any]) -> None:
    text = json.dumps(row["body"])
    assert reading(row, text) == reading(row, text.encode()) == reading(row, row["body"])


@pytest.mark.parametrize(
    ("told", "five", "hour"), [(1_000, 0, 1_000), (1_200, 200, 1_000), (400, 400, 0), (None, 0, 1_000)]
)
def test_tokens_cached_for_an_hour_stay_so_to_the_end_of_a_stream(told: int | None, five: int, hour: int) -> None:
    """`message_delta` repeats the total of what was written, without its split; an hour costs more than five minutes."""
    split = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 1_000}
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 1_000, "cache_creation": split, "output_tokens": 1}
    last = {"input_tokens": 3, "cache_creation_input_tokens": told, "output_tokens": 50}
    events = [
        {"type": "message_start", "message": {"model": "claude-sonnet-4-5", "usage": usage}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": last},
        {"type": "message_stop"},
    ]
    found = Usage.from_response("anthropic", events)
    assert (found.cache_write_5m_tokens, found.cache_write_1h_tokens) == (five, hour)
    assert found.input_tokens == 3 + five + hour


@pytest.mark.parametrize("snake", [False, True])
def test_a_google_stream_ends_with_its_last_round(snake: bool) -> None:
    """A round of its own tools ends with a reason too; as on the wire, and as google-genai's objects say it."""

    def chunk(out: int, finish: str | None) -> dict[str, Any]:
        content = {"parts": [{"text": "x"}], "role": "model"}
        if snake:
            usage = {"prompt_token_count": 46, "candidates_token_count": out, "total_token_count": 46 + out}
            return {"candidates": [{"content": content, "finish_reason": finish}], "usage_metadata": usage}
        told = {"promptTokenCount": 46, "candidatesTokenCount": out, "totalTokenCount": 46 + out}
        return {"candidates": [{"content": content, "finishReason": finish}], "usageMetadata": told}

    events = [chunk(1, None), chunk(180, "STOP"), chunk(181, None), chunk(235, "STOP")]
    for cut in (1, 3):
        with pytest.raises(UnreadableAnswer) as caught:
            Usage.from_response("google", events[:cut])
        assert caught.value.fields["partial"].output_tokens == [1, 181][cut // 2]
    assert Usage.from_response("google", events).output_tokens == 235


def test_a_response_that_is_told_twice_is_billed_once() -> None:
    """By a stream's last event, and as the answer that an SDK makes of the stream; the turns of a session are added up."""

    def told(id: str) -> dict[str, Any]:
        usage = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
        return {"id": id, "object": "response", "model": "gpt-4o", "status": "completed", "output": [], "usage": usage}

    def done(id: str) -> dict[str, Any]:
        return {"type": "response.completed", "response": told(id)}

    assert Usage.from_response("openai", [done("a"), told("a")]).input_tokens == 100
    assert Usage.from_response("openai", [done("a"), done("a")]).output_tokens == 10
    assert Usage.from_response("openai", [done("a"), done("b")]).input_tokens == 200


@pytest.mark.parametrize("kind", ["chat.completion.chunk", "text_completion"])
def test_counts_that_come_with_every_chunk_are_final_when_the_answer_has_ended(kind: str) -> None:
    """Perplexity and vLLM tell with each chunk what it was up to there: where the stream is cut, more was billed."""
    piece: dict[str, Any] = {"text": "x"} if kind == "text_completion" else {"delta": {"content": "x"}}

    def chunk(out: int | None, finish: str | None = None) -> dict[str, Any]:
        usage = None if out is None else {"prompt_tokens": 10, "completion_tokens": out, "total_tokens": 10 + out}
        choice = {"index": 0, **piece, "finish_reason": finish}
        return {"object": kind, "model": "sonar", "choices": [choice], "usage": usage}

    for events in ([chunk(1)], [chunk(None), chunk(1), chunk(2)]):
        with pytest.raises(UnreadableAnswer) as cut:
            Usage.from_response("perplexity", events)
        assert cut.value.fields["reason"] == "no_usage"
        assert cut.value.fields["partial"].output_tokens == len(events) - (len(events) > 1)
    for events in ([chunk(1, "stop")], [chunk(1), chunk(2, "stop")], [chunk(1), chunk(2), chunk(None, "stop")]):
        assert Usage.from_response("perplexity", events).output_tokens == min(2, len(events))


def test_a_cut_anthropic_stream_tells_its_input_and_is_no_usage() -> None:
    reader = StreamReader("anthropic")
    start = {"input_tokens": 7, "cache_read_input_tokens": 90, "cache_creation_input_tokens": 3, "output_tokens": 1}
    reader.feed({"type": "message_start", "message": {"model": "claude-sonnet-4-5", "usage": start}})
    reader.feed({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x" * 1000}})
    assert reader.usage() is None
    partial = reader.partial()
    assert partial is not None
    assert (partial.input_tokens, partial.cache_read_tokens, partial.cache_write_5m_tokens) == (100, 90, 3)
    events = [{"type": "message_start", "message": {"model": "claude-sonnet-4-5", "usage": start}}]
    with pytest.raises(UnreadableAnswer) as caught:
        read_usage("anthropic", events)
    assert caught.value.reason == "no_usage"
    assert caught.value.partial == partial
    reader.feed({"type": "message_delta", "usage": {"output_tokens": 55}})
    assert reader.usage() == partial.replace(output_tokens=55)


ODD: dict[str, tuple[str, ...]] = {  # by its place in an answer: what may be told in other words than most tell it
    "": ("model", "service_tier", "object", "metadata", "usage_breakdown", "x_groq", "type", "moderation"),
    "usage": ("prompt_tokens", "completion_tokens", "total_tokens", "cost", "input_tokens", "num_search_queries"),
    "prompt_tokens_details": ("cached_tokens", "audio_tokens", "image_tokens", "cache_write_tokens", "video_tokens"),
    "completion_tokens_details": ("reasoning_tokens", "audio_tokens", "image_tokens", "text_tokens"),
    "message": ("executed_tools",),
}
VALUES: tuple[Any, ...] = (
    None,
    "",
    0,
    1,
    7,
    -1,
    20,
    90,
    200,
    True,
    2.0,
    "7",
    [],
    "flex",
    "auto",
    "interaction",
    "message",
)
VALUES += ({"usage": {"inputTokens": 3}}, {"usage": {"prompt_tokens": 3}}, [{"type": "search"}], {"models": []}, 2**48)


def odd_answers(place: str) -> Iterator[dict[str, Any]]:
    """The usual answer, and the same with one thing that few tell."""
    for where, name, value in [("", "object", "chat.completion")] + [
        (p, n, v) for p in ODD for n in ODD[p] for v in VALUES
    ]:
        message: dict[str, Any] = {"content": "x"}
        heard, said = {"cached_tokens": 20, "audio_tokens": 7}, {"reasoning_tokens": 7, "audio_tokens": 1}
        usage: dict[str, Any] = {"prompt_tokens": 90, "completion_tokens": 20, "total_tokens": 110}
        usage |= {"prompt_tokens_details": heard, "completion_tokens_details": said}
        answer = {"object": "chat.completion", "model": "gpt-4o", "choices": [{place: message}], "usage": usage}
        parts: dict[str, dict[str, Any]] = {"": answer, "usage": usage, "message": message}
        parts |= {"prompt_tokens_details": heard, "completion_tokens_details": said}
        parts[where][name] = value
        yield answer


@pytest.mark.parametrize("place", ["message", "delta"])
def test_the_usual_answer_reads_at_once_as_the_families_read_it(place: str) -> None:
    """A further event, which tells nothing, has the reader go through the families, and changes nothing."""
    for answer in odd_answers(place):
        found: list[Any] = []
        for events in ([answer], [answer, {"object": "ping"}]):
            reader = StreamReader("openai")
            for event in events:
                reader.feed(event)
            try:
                found.append(reader.usage())
            except UnreadableAnswer as error:
                found.append(str(error))
        assert found[0] == found[1], answer


ODD_MESSAGE: dict[str, tuple[str, ...]] = {
    "": ("model", "type", "content", "container", "object", "usage", "stop_reason", "model_extra"),
    "usage": (
        *("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation"),
        *("service_tier", "inference_geo", "iterations", "server_tool_use", "speed", "output_tokens_details"),
    ),
    "cache_creation": ("ephemeral_1h_input_tokens", "ephemeral_5m_input_tokens"),
    "block": ("type", "name"),
}


def odd_messages() -> Iterator[dict[str, Any]]:
    """The usual message, and the same with one thing that few tell."""
    told = (*VALUES, "us", "batch", "standard", "not_available", "server_tool_use", {"thinking_tokens": 3})
    for where, name, value in [("", "model", "claude")] + [
        (p, n, v) for p in ODD_MESSAGE for n in ODD_MESSAGE[p] for v in told
    ]:
        block: dict[str, Any] = {"type": "text", "text": "x", "name": "code_execution"}
        split = {"ephemeral_1h_input_tokens": 20, "ephemeral_5m_input_tokens": 70}
        usage: dict[str, Any] = {"input_tokens": 5, "output_tokens": 9, "cache_read_input_tokens": 7}
        usage |= {"cache_creation_input_tokens": 90, "cache_creation": split, "service_tier": "standard"}
        answer = {"type": "message", "model": "claude", "content": [block], "usage": usage}
        {"": answer, "usage": usage, "cache_creation": split, "block": block}[where][name] = value
        yield answer


def test_the_usual_message_reads_at_once_as_its_family_reads_it() -> None:
    row = {"provider": "anthropic", "status": 200}
    for answer in odd_messages():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bursar.answers.read.usual_message", lambda _: None)
            by_family = reading(row, answer)
        assert reading(row, answer) == by_family, answer


def test_what_the_usual_readers_cannot_look_into_is_read_by_its_family() -> None:
    """A choice or a block that is of some other class may tell of tools all the same."""

    class Told(dict[str, Any]):
        pass

    used = {"executed_tools": [{"type": "search"}]}
    counts = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    for choice in (Told(message=used), {"message": Told(used)}, {"delta": Told(used)}):
        answer = {"object": "chat.completion", "model": "m", "choices": [choice], "usage": counts}
        assert read_usage("groq", answer).server_tools == {"web_search": 1}
    block = Told(type="server_tool_use", name="code_execution")
    message = {"type": "message", "content": [block], "usage": {"input_tokens": 3, "output_tokens": 2}}
    assert read_usage("anthropic", message).server_tools == {"code_execution": 1}


def test_a_reader_keeps_no_text() -> None:
    reader = StreamReader("openai")
    for _ in range(1000):
        reader.feed({"choices": [{"index": 0, "delta": {"content": "x" * 1000}}], "model": "gpt-4o", "usage": None})
    kept = repr([vars(tally) for tally in reader._tallies.values()])
    assert "xxx" not in kept
    assert len(kept) < 1000


def test_feeding_never_raises_and_reading_tells_the_fault() -> None:
    reader = StreamReader("openai")
    reader.feed({"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": 2}})
    reader.feed(b"{not json")
    with pytest.raises(UnreadableAnswer) as caught:
        reader.usage()
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("cost", "nanos"),
    [
        (0.00010435, 104350),
        (Decimal("1E-9"), 1),
        (0.0000000005, 1),
        ("0.1", 100_000_000),
        (0.0004970133333333333, 497013),
        (3, 3 * 10**9),
    ],
)
def test_a_stated_bill_is_exact(cost: Any, nanos: int) -> None:
    body = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cost": cost}}
    assert read_usage("openrouter", body).stated_cost_nanos == nanos


def test_own_key_costs_add_the_upstream_bill() -> None:
    usage: dict[str, Any] = {"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.001, "is_byok": True}
    assert read_usage("openrouter", {"usage": usage}).stated_cost_nanos is None
    usage["cost_details"] = {"upstream_inference_cost": 0.02}
    assert read_usage("openrouter", {"usage": usage}).stated_cost_nanos == 21_000_000


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"error": {"type": "invalid_request_error", "message": "no"}}, 400, "not_billable"),
        ({"error": {"type": "invalid_request_error", "message": "no"}}, 200, "not_billable"),
        ({"error": {"type": "rate_limit_error"}}, 429, "not_billable"),
        ({"error": {"type": "api_error"}}, 500, "no_usage"),
        ({"error": {"type": "api_error"}}, 200, "no_usage"),
        ({"error": {"code": 504, "status": "DEADLINE_EXCEEDED"}}, 200, "no_usage"),
        ({"message": "timeout"}, 408, "no_usage"),
        ({"error": {"code": "tool_use_failed", "failed_generation": "{}"}}, 400, "no_usage"),
        ({"input_tokens": 12}, 200, "not_billable"),
        ({"totalTokens": 5, "promptTokensDetails": []}, 200, "not_billable"),
        ("v=0\r\no=- 1 1 IN IP4 0.0.0.0", 201, "not_billable"),
        ("<html>bad gateway</html>", 502, "no_usage"),
        ("<html>forbidden</html>", 403, "not_billable"),
        ("<html>welcome</html>", 200, "unreadable"),
        ("", 200, "no_usage"),
        ({}, 200, "no_usage"),
        ([], 200, "no_usage"),
        ({"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}, 200, "no_usage"),
        ({"usage": {"prompt_tokens": float("nan")}}, 200, "unreadable"),
        ({"usage": {"prompt_tokens": -5}}, 200, "unreadable"),
        ({"usage": {"prompt_tokens": 2**60}}, 200, "unreadable"),
        ({"usage": {"prompt_tokens": 10**5000}}, 200, "unreadable"),
        ({"usage": {"prompt_tokens": 1.5}}, 200, "unreadable"),
        ({"usage": {"prompt_tokens": True}}, 200, "unreadable"),
        ({"usage": {"prompt_tokens": "many"}}, 200, "unreadable"),
        ({"usage": {"prompt_tokens": 1, "prompt_tokens_details": [1]}}, 200, "unreadable"),
        (object(), 200, "unreadable"),
        (None, 200, "unreadable"),
        (7, 200, "unreadable"),
    ],
)
def test_what_holds_no_usage_says_why(body: Any, status: int, reason: str) -> None:
    with pytest.raises(UnreadableAnswer) as caught:
        Usage.from_response("openai", body, status=status)
    assert (caught.value.reason, caught.value.provider) == (reason, "openai")


def test_a_billed_error_is_billed() -> None:
    body = {
        "object": "response",
        "status": "failed",
        "error": {"code": "server_error"},
        "usage": {"input_tokens": 9, "output_tokens": 4},
    }
    assert read_usage("openai", body).output_tokens == 4


def test_other_models_are_inside_the_totals_and_come_apart_for_pricing() -> None:
    rounds = [
        {"type": "message", "input_tokens": 10, "output_tokens": 4},
        {"type": "advisor_message", "model": "claude-opus-4-8", "input_tokens": 100, "output_tokens": 20},
        {"type": "compaction", "input_tokens": 50, "output_tokens": 5, "cache_read_input_tokens": 1000},
    ]
    top = {"input_tokens": 10, "output_tokens": 4, "cache_read_input_tokens": 0, "iterations": rounds}
    usage = read_usage("anthropic", {"type": "message", "model": "claude-sonnet-5", "usage": top})
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) == (1160, 29, 1000)
    own, advisor = usage.by_model()
    assert (own.model, own.input_tokens, own.output_tokens, own.cache_read_tokens) == ("claude-sonnet-5", 1060, 9, 1000)
    assert (advisor.model, advisor.input_tokens, advisor.output_tokens) == ("claude-opus-4-8", 100, 20)
    assert Usage(**usage.as_dict()) == usage


@pytest.mark.parametrize(
    "line",
    [
        {
            "custom_id": "a",
            "response": {"status_code": 200, "body": {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}},
        },
        {
            "custom_id": "a",
            "result": {
                "type": "succeeded",
                "message": {"type": "message", "usage": {"input_tokens": 3, "output_tokens": 2}},
            },
        },
        {"key": "a", "response": {"usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2}}},
    ],
)
def test_a_line_of_batch_results_is_read_as_batch(line: dict[str, Any]) -> None:
    assert read_usage("any", line) == Usage(input_tokens=3, output_tokens=2, batch=True)


def test_counts_come_from_boto3_and_http_answers() -> None:
    meta = {
        "HTTPStatusCode": 200,
        "HTTPHeaders": {"x-amzn-bedrock-input-token-count": "5", "x-amzn-bedrock-output-token-count": "6"},
    }
    assert read_usage("bedrock", {"body": object(), "ResponseMetadata": meta}) == Usage(input_tokens=5, output_tokens=6)
    content = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
    answer = SimpleNamespace(status_code=200, content=content, headers={})
    assert read_usage("openai", answer) == Usage(input_tokens=3, output_tokens=2)


def test_langchains_usage_metadata_reads_through_the_same_door() -> None:
    details = {"cache_read": 40, "ephemeral_1h_input_tokens": 10, "cache_creation": 10, "audio": 5}
    usage = {
        "input_tokens": 100,
        "output_tokens": 9,
        "total_tokens": 109,
        "input_token_details": details,
        "output_token_details": {"reasoning": 4},
    }
    expected = Usage(
        input_tokens=100,
        output_tokens=9,
        cache_read_tokens=40,
        cache_write_1h_tokens=10,
        input_audio_tokens=5,
        reasoning_tokens=4,
    )
    assert read_usage("anthropic", {"usage": usage}) == expected


def test_sdk_objects_read_as_their_json() -> None:
    openai = pytest.importorskip("openai.types.chat")
    anthropic = pytest.importorskip("anthropic.types")
    seen = 0
    for row in RECORDED:
        if "usage" not in row or "events" in row["body"]:
            continue
        kind = {"chat.completions": openai.ChatCompletion, "messages": anthropic.Message}.get(row["endpoint_kind"])
        if kind is not None:
            seen += 1
            assert reading(row, kind.construct(**row["body"])) == {"usage": row["usage"]}
    assert seen > 50
    row = {"status": 200}
    for provider, kind, odd, usual in (
        ("openai", openai.ChatCompletion, odd_answers("message"), usual_usage),
        ("anthropic", anthropic.Message, odd_messages(), usual_message),
    ):
        found = []
        for answer in odd:
            answered = kind.construct(**answer)
            vars(answered)["_request_id"] = "req_1"  # where the SDKs put it
            told = answered.model_dump(warnings=False)
            assert reading(row | {"provider": provider}, answered) == reading(row | {"provider": provider}, told), (
                answer
            )
            found.append(usual(answered))
        assert found[0] is not None  # the usual one
        assert None in found


def test_unread_streams_are_left_to_their_users() -> None:
    stream = iter([{"usage": {"prompt_tokens": 1}}])
    with pytest.raises(UnreadableAnswer):
        read_usage("openai", stream)
    assert next(stream) == {"usage": {"prompt_tokens": 1}}


junk = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4)),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from(
        [10**4000, -1, 2**48, float("nan"), float("inf"), "9" * 50, Decimal("1E+9999"), [], {}, [[[]]], object()]
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()
    return [place for name, entry in inner for place in [(*path, name), *places(entry, (*path, name))]]


def planted(value: Any, path: tuple[Any, ...], thing: Any) -> Any:
    if not path:
        return thing
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = planted(copy[path[0]], path[1:], thing)
    return copy


@given(st.data())
def test_hostile_answers_raise_one_error_and_readings_keep_their_parts(data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(RECORDED))
    body = row["body"]
    for _ in range(data.draw(st.integers(1, 3))):
        spots = places(body)
        spots = [spot for spot in spots if any("sage" in str(name) or "oken" in str(name) for name in spot)] or spots
        if spots:
            body = planted(body, data.draw(st.sampled_from(spots)), data.draw(junk))
    try:
        usage = read_usage(row["provider"], body, headers=row.get("headers"), status=row["status"])
    except UnreadableAnswer:
        return
    for part in (usage, *usage.other_models):
        assert part.cache_read_tokens + part.cache_write_5m_tokens + part.cache_write_1h_tokens <= part.input_tokens
        assert part.input_audio_tokens + part.input_image_tokens + part.input_video_tokens <= part.input_tokens
        assert part.reasoning_tokens + part.output_audio_tokens + part.output_image_tokens <= part.output_tokens
    assert Usage(**usage.as_dict()) == usage


@given(
    st.recursive(
        junk, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    )
)
def test_any_junk_raises_one_error(body: Any) -> None:
    with pytest.raises(UnreadableAnswer):
        read_usage("openai", body)


@given(st.text() | st.binary())
def test_any_text_raises_one_error(body: Any) -> None:
    with pytest.raises(UnreadableAnswer):
        read_usage("openai", body)
