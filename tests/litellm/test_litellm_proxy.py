"""The LiteLLM proxy, run for real with two workers: refusals, settlements, who asked, and one budget for both workers."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("orjson", reason="LiteLLM is there without its proxy")

import httpx
from rungs import CHEAPER, RATES

from bursar import Bursar, Operator, UsageRecord
from bursar.testing.provider import Answer, Fault, Provider

pytestmark = pytest.mark.slow

PROMPT = "abc " * 1_000
COST_NANOS = 7_500_000
DEAR = Answer(input_tokens=1_000, output_tokens=500)

CONFIG = """
model_list:
  - model_name: main
    litellm_params: {{model: openai/gpt-4o, api_base: "{url}/v1", api_key: any}}
  - model_name: claude
    litellm_params: {{model: anthropic/claude-sonnet-4-5, api_base: "{url}", api_key: any}}
  - model_name: small
    litellm_params: {{model: openai/text-embedding-3-small, api_base: "{url}/v1", api_key: any}}
router_settings:
  disable_cooldowns: true
  num_retries: 0
litellm_settings:
  callbacks: bursar_litellm.proxy.logger
general_settings:
  custom_auth: keys.check
  pass_through_endpoints:
    - path: "/raw/chat/completions"
      target: "{url}/v1/chat/completions"
      headers: {{Authorization: "bearer any"}}
    - path: "/any"
      target: "{url}"
      include_subpath: true
      headers: {{Authorization: "bearer any"}}
"""
# Virtual keys need a database; keys of the form `key.TEAM.USER` tell the same of who asks.
KEYS = """
from litellm.proxy._types import UserAPIKeyAuth

async def check(request, api_key):
    key, team, user = api_key.split(".")
    return UserAPIKeyAuth(api_key=key, team_id=team, user_id=user, org_id="acme")
"""
POLICY = """
[[budget]]
name = "crowd"
limit = "0.078 USD"
match = { team = "crowd" }

[[budget]]
name = "patient"
limit = "0.078 USD"
match = { team = "patient" }
on_exceed = "wait 60s"

[[budget]]
name = "broke"
limit = "0.000001 USD"
match = { team = "broke" }

[[budget]]
name = "changes"
limit = "1 USD"
per = "team"
match = { team = "changes-*" }
thresholds = [
  { at = "0.5%", action = "downgrade", models = { gpt-4o = "gpt-4o-mini", claude-sonnet-4-5 = "claude-haiku-4-5" } },
  { at = "0.5%", action = "clamp", max_output_tokens = 50 },
]

[[budget]]
name = "ladder"
limit = "0.075 USD"
match = { team = "ladder" }
thresholds = [
  { at = "50%", action = "notify" },
  { at = "80%", action = "downgrade", models = { gpt-4o = "gpt-4o-mini" } },
  { at = "95%", action = "ask" },
  { at = "100%", action = "kill" },
]
"""


class Proxy:
    """The proxy as its clients see it, and the books behind it."""

    def __init__(self, url: str, provider: Provider, bursar: Bursar) -> None:
        self.url, self.provider, self.bursar = url, provider, bursar
        self.operator = Operator(bursar.store, Operator(bursar.store).appoint())

    def client(self, team: str, user: str = "ann") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer key.{team}.{user}"}, timeout=60)

    def records(self, team: str) -> list[UsageRecord]:
        return list(self.bursar.records(team=team))

    def settled(self, team: str, count: int) -> list[UsageRecord]:
        """The team's records, once there are so many: what the proxy passes on is settled after its answer."""
        deadline = time.monotonic() + 20
        turn = threading.Event()
        while time.monotonic() < deadline:
            found = self.records(team)
            if len(found) >= count and not self.bursar.store.open_reservations():
                return found
            turn.wait(0.02)
        raise AssertionError(f"{len(self.records(team))} of {count} records after 20 s")


# The servers that LiteLLM has for several workers. This one imports it once, and forks; the usual one does so in each.
@pytest.fixture(scope="module", params=["gunicorn", pytest.param("uvicorn", marks=pytest.mark.nightly)])
def proxy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    home = tmp_path_factory.mktemp("proxy")
    store = f"sqlite:///{home}/bursar.db"
    with Provider(DEAR, rates=RATES) as provider:
        (home / "config.yaml").write_text(CONFIG.format(url=provider.url))
        (home / "keys.py").write_text(KEYS)
        (home / "bursar.toml").write_text(POLICY)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = {
            "BURSAR_POLICY": str(home / "bursar.toml"),
            "BURSAR_STORE": store,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "ANTHROPIC_API_BASE": provider.url,
            "ANTHROPIC_API_KEY": "any",
            "NO_PROXY": "*",
            "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(16)}",  # it does not start without one
        }
        command = [Path(sys.executable).with_name("litellm"), "--config", home / "config.yaml", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--num_workers", "2"]
        # A worker that is still importing LiteLLM on a busy machine is not a dead one.
        command += ["--run_gunicorn"] if request.param == "gunicorn" else ["--timeout_worker_healthcheck", "120"]
        with (home / "log").open("w") as log:
            server = subprocess.Popen(
                command, env={**os.environ, **told}, cwd=home, stdout=log, stderr=log, start_new_session=True
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(url, server, home / "log")
            with Bursar(store) as bursar:
                yield Proxy(url, provider, bursar)
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # it takes seconds to say goodbye
            server.wait(20)


def _wait_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline, turn = time.monotonic() + 200, threading.Event()
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/health/liveliness", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            turn.wait(0.2)
    raise AssertionError(f"the proxy did not start: {log.read_text()[-2000:]}")


MESSAGES = [{"role": "user", "content": PROMPT}]
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": "main", "messages": MESSAGES, "max_tokens": 500}),
    "stream": ("/v1/chat/completions", {"model": "main", "messages": MESSAGES, "max_tokens": 500, "stream": True}),
    "responses": ("/v1/responses", {"model": "main", "input": PROMPT, "max_output_tokens": 500}),
    "responses-stream": ("/v1/responses", {"model": "main", "input": PROMPT, "max_output_tokens": 500, "stream": True}),
    "messages-of-openai": ("/v1/messages", {"model": "main", "messages": MESSAGES, "max_tokens": 500}),
    "pass-through": ("/raw/chat/completions", {"model": "gpt-4o", "messages": MESSAGES, "max_tokens": 500}),
    "pass-through-stream": (
        "/raw/chat/completions",
        {"model": "gpt-4o", "messages": MESSAGES, "max_tokens": 500, "stream": True},
    ),
}
OTHER_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings": ("/v1/embeddings", {"model": "small", "input": [PROMPT]}),
    "images": ("/v1/images/generations", {"model": "main", "prompt": PROMPT}),
    "messages": ("/v1/messages", {"model": "claude", "messages": MESSAGES, "max_tokens": 500}),
    "messages-stream": ("/v1/messages", {"model": "claude", "messages": MESSAGES, "max_tokens": 500, "stream": True}),
    "anthropic-pass-through": (
        "/anthropic/v1/messages",
        {"model": "claude-sonnet-4-5", "messages": MESSAGES, "max_tokens": 500},
    ),
}


@pytest.mark.parametrize("name", [*CALLS, *OTHER_CALLS])
def test_a_refusal_is_402_and_sends_nothing(name: str, proxy: Proxy) -> None:
    path, body = (CALLS | OTHER_CALLS)[name]
    sent = proxy.provider.billed_calls  # not all requests: workers look at their models when they have started
    with proxy.client("broke") as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 402, answer.text
    assert proxy.provider.billed_calls == sent
    assert "'broke' refused the call" in answer.text
    if path != "/v1/messages":  # there LiteLLM speaks Anthropic's language, which has no such type
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("budget_exceeded", "budget", "402")


@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_settles_to_what_the_provider_billed(name: str, proxy: Proxy) -> None:
    path, body = CALLS[name]
    team = f"settles-{name}"
    with proxy.client(team) as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    (record,) = proxy.settled(team, 1)
    assert (record.estimated, record.cost_nanos) == (False, COST_NANOS)
    assert (record.tags["provider"], record.tags["model"]) == ("openai", "gpt-4o")
    assert (record.tags["user"], record.tags["org"], record.tags["key"]) == ("ann", "acme", "key")


def test_anthropics_format_is_settled_by_its_own_counts(proxy: Proxy) -> None:
    with proxy.client("anthropic") as client:
        for name in ("messages", "messages-stream", "anthropic-pass-through"):
            path, body = OTHER_CALLS[name]
            assert client.post(path, json=body).status_code == 200
    records = proxy.settled("anthropic", 3)
    assert [(one.estimated, one.cost_nanos) for one in records] == [(False, 10_500_000)] * 3


def test_clients_may_add_tags_but_not_change_who_they_are(proxy: Proxy) -> None:
    path, body = CALLS["chat"]
    claimed = {"team": "rich", "team_alias": "Rich", "key_alias": "boss", "user": "eve"}
    claimed |= {"deployment": "free", "tag.night": "no"}
    said = {"bursar": {"agent": "planner", **claimed}, "tags": ["night"]}
    with proxy.client("honest") as client:
        client.post(path, json={**body, "metadata": said, "user": "customer-7"})
    (record,) = proxy.settled("honest", 1)
    assert (record.tags["agent"], record.tags["tag.night"]) == ("planner", "yes")
    assert (record.tags["team"], record.tags["user"]) == ("honest", "ann")
    assert record.tags.keys().isdisjoint({"team_alias", "key_alias"})
    assert record.tags["customer"] == "customer-7"
    assert record.tags["deployment"] == "main"


@pytest.mark.parametrize("team", ["crowd", "patient"])
def test_two_workers_and_twenty_clients_share_one_budget(team: str, proxy: Proxy) -> None:
    """Never more than ten of a budget for ten, exactly ten where they wait; and the ledger is the provider's account."""
    path, body = CALLS["chat"]
    before = proxy.provider.billed_nanos

    def one(_: int) -> int:
        with proxy.client(team) as client:
            return client.post(path, json=body).status_code

    with ThreadPoolExecutor(20) as pool:
        seen = list(pool.map(one, range(40)))
    assert set(seen) == {200, 402}
    billed = proxy.provider.billed_nanos - before
    assert billed == seen.count(200) * COST_NANOS
    assert billed <= 78_000_000
    if team == "patient":
        assert seen.count(200) == 10
    proxy.settled(team, seen.count(200))
    records = [record for record in proxy.records(team) if record.outcome == "completed"]
    assert sum(record.cost_nanos for record in records) == billed
    (status,) = [one for one in proxy.bursar.status(team=team) if one.name == team]
    assert (status.reserved, int(status.spent * 10**9)) == (0, billed)


def test_the_ladder_from_end_to_end(proxy: Proxy) -> None:
    """Downgraded at 80 %, 402 at 95 % until an operator approves, 402 again from 100 % on; nothing is sent twice."""
    before = len(proxy.provider.account)
    # Eight calls of 0.75 cents, one of 1.155 by the cheaper model, and one of 0.45, which was thought to be less.
    proxy.provider.script([*[DEAR] * 8, Answer(input_tokens=1_000, output_tokens=19_000), Answer(input_tokens=30_000)])
    body = {"model": "main", "messages": [{"role": "user", "content": "hi"}]}
    with proxy.client("ladder") as client:

        def post() -> tuple[int, Any]:
            answer = client.post("/v1/chat/completions", json=body)
            return answer.status_code, answer.json()

        assert [post()[0] for _ in range(9)] == [200] * 9
        for _ in range(2):
            status, said = post()
            assert (status, said["error"]["type"], said["error"]["param"]) == (402, "budget_exceeded", "budget")
        proxy.operator.approve(*re.findall(r"bursar approve (ask-\w+)", said["error"]["message"]))
        assert post()[0] == 200
        for _ in range(2):
            status, said = post()
            assert (status, said["error"]["type"]) == (402, "budget_exceeded")
            assert "kill" in said["error"]["message"]
    served = proxy.provider.account[before:]
    assert [one.model for one in served] == ["gpt-4o"] * 8 + ["gpt-4o-mini"] * 2
    records = [record for record in proxy.settled("ladder", 10) if record.outcome != "blocked"]
    assert [record.cost_nanos for record in records] == [one.cost_nanos for one in served]
    assert {record.model_asked for record in records[8:]} == {"gpt-4o"}


@pytest.mark.parametrize("name", ["pass-through", "pass-through-stream", "anthropic-pass-through"])
def test_a_request_that_is_passed_on_is_changed_too(name: str, proxy: Proxy) -> None:
    path, body = (CALLS | OTHER_CALLS)[name]
    with proxy.client(f"changes-{name}") as client:
        assert client.post(path, json=body).status_code == 200
        proxy.settled(f"changes-{name}", 1)
        assert client.post(path, json=body).status_code == 200
    first, second = proxy.settled(f"changes-{name}", 2)
    assert (second.model_asked, second.model) == (first.model, CHEAPER[first.model])
    served = proxy.provider.account[-1]
    assert (served.model, served.output_tokens) == (second.model, 50)
    assert (second.estimated, second.cost_nanos) == (False, served.cost_nanos)


def test_a_stream_is_stopped_where_it_is(proxy: Proxy) -> None:
    """Its last event says why, as any error that LiteLLM's proxy meets in mid-stream."""
    path, body = CALLS["stream"]
    proxy.provider.script([Answer(input_tokens=1_000, output_tokens=500, chunks=400, event_delay_s=0.02)])
    with proxy.client("stopped") as client, client.stream("POST", path, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        proxy.operator.freeze({"team": "stopped"})
        events = [line for line in lines if line.startswith("data: ")]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("budget_exceeded", "402")
    (record,) = proxy.settled("stopped", 1)
    assert record.reason == "stopped in mid-stream (frozen)"
    proxy.provider.wait_idle()
    assert proxy.provider.account[-1].client_gone


def test_a_client_that_leaves_in_the_middle_of_a_stream_is_billed(proxy: Proxy) -> None:
    path, body = CALLS["stream"]
    proxy.provider.script([Answer(input_tokens=1_000, output_tokens=500, chunks=200, event_delay_s=0.01)])
    with proxy.client("leaver") as client, client.stream("POST", path, json=body) as answer:
        next(answer.iter_lines())
    (record,) = proxy.settled("leaver", 1)
    assert record.cost_nanos > 0


@pytest.mark.parametrize(("status", "estimated"), [(400, False), (500, True)])
def test_a_failure_costs_nothing_only_when_it_is_clear(status: int, estimated: bool, proxy: Proxy) -> None:
    for name in ("chat", "pass-through"):
        path, body = CALLS[name]
        team = f"fails-{status}-{name}"
        proxy.provider.script([Fault("refuse", status=status)])
        with proxy.client(team) as client:
            assert client.post(path, json=body).status_code == status
        (record,) = proxy.settled(team, 1)
        assert (record.estimated, record.cost_nanos > 0) == (estimated, estimated), name


def test_what_has_no_price_before_it_ran_is_refused(proxy: Proxy) -> None:
    sent = proxy.provider.requests
    batch = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    with proxy.client("batch") as client:
        answer = client.post("/v1/batches", json=batch)
    assert answer.status_code >= 400
    assert proxy.provider.requests == sent


LATER: dict[str, tuple[str, dict[str, Any]]] = {
    "/anthropic/v1/messages/batches": ("create_batch", {"requests": []}),
    "/any/v1/threads/t/runs": ("run_thread", {"assistant_id": "a"}),
    "/any/v1/threads/runs": ("run_thread", {"assistant_id": "a"}),
    "/any/v1/evals/e/runs": ("create_run", {"data_source": {}}),
    "/any/v1/fine_tuning/jobs": ("create_fine_tuning_job", {"model": "gpt-4o", "training_file": "f"}),
    "/any/v1/realtime/client_secrets": ("realtime_calls", {"session": {"model": "gpt-realtime"}}),
    "/v1/realtime/client_secrets": (
        "create_realtime_client_secret",
        {"session": {"type": "realtime", "model": "main"}},
    ),
}


@pytest.mark.parametrize("path", list(LATER))
def test_what_is_billed_later_is_not_passed_on(path: str, proxy: Proxy) -> None:
    name, body = LATER[path]
    sent = proxy.provider.requests
    with proxy.client("later") as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert f"{name} cannot be held against a budget" in answer.text
    assert proxy.provider.requests == sent


def test_an_upload_that_nothing_is_shown_of_is_not_passed_on(proxy: Proxy) -> None:
    sent = proxy.provider.requests
    with proxy.client("uploads") as client:
        sound = {"file": ("a.wav", b"RIFF0000WAVE", "audio/wav")}
        answer = client.post("/any/v1/audio/transcriptions", data={"model": "whisper-1"}, files=sound)
    assert answer.status_code == 400
    assert "upload_passed_on cannot be held" in answer.text
    assert proxy.provider.requests == sent


def test_what_costs_nothing_is_passed_on(proxy: Proxy) -> None:
    """A token count, whose end LiteLLM does not tell, and the look-up of a model."""
    counted = {"model": "claude-sonnet-4-5", "messages": MESSAGES}
    with proxy.client("broke") as client:
        before = len(proxy.records("broke"))
        answers = [
            client.post("/anthropic/v1/messages/count_tokens", json=counted),
            client.get("/any/v1/models/gpt-4o"),
        ]
    assert [answer.status_code for answer in answers] == [404, 404]  # the provider's own
    assert len(proxy.records("broke")) == before


def test_the_model_in_the_path_is_the_one_that_is_asked(proxy: Proxy) -> None:
    """Whatever the request's body says."""
    body = {"model": "gemini-2.5-flash-lite", "contents": [{"role": "user", "parts": [{"text": PROMPT}]}]}
    with proxy.client("broke") as client:
        assert client.post("/any/v1beta/models/gemini-2.5-pro:generateContent", json=body).status_code == 402
    assert proxy.records("broke")[-1].tags["model"] == "gemini-2.5-pro"
