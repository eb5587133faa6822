"""A cap for ten calls, under Bursar and under its peers: how many calls a provider bills, and what a guarded call costs.

Run: `python bench/bench_peers.py [NAME] [--json FILE]`, in an environment with the peers of peers.txt. The provider, on the
loopback, bills $0.0075 for each call and answers after 150 ms; the cap is $0.078. A peer runs in a process of its own, in an empty
folder. What a call costs is its processor time, with OpenAI's client answered in memory, in turns with the same call unguarded.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measure import options, save, table
from peers import PEERS, Peer, create

from bursar.testing.provider import Answer, Provider

CAP, FITS = 0.078, 10
ALONE, TOGETHER = 30, 50
CALLS, ROUNDS = 100, 7
SCENARIOS = ("alone", "threads", "tasks", "added")
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_764_000_000,
    "model": "gpt-4o-2024-08-06",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "dog"}}],
    "usage": {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500},
}


def tally(tries: list[object]) -> dict[str, Any]:
    """What became of the calls: answered, or the names of their errors."""
    return {"became": Counter(type(one).__name__ if isinstance(one, Exception) else "answered" for one in tries)}


def tried(call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - each peer has its own for a call that is refused
        return error


def alone(peer: Peer, url: str) -> dict[str, Any]:
    from openai import OpenAI

    with peer.make(OpenAI(base_url=url, api_key="any", max_retries=0), CAP) as call:
        return tally([tried(call) for _ in range(ALONE)])


def threads(peer: Peer, url: str) -> dict[str, Any]:
    from openai import OpenAI

    together, found = threading.Barrier(TOGETHER), []

    def one() -> None:
        together.wait()
        found.append(tried(call))

    with peer.make(OpenAI(base_url=url, api_key="any", max_retries=0), CAP) as call:
        started = [threading.Thread(target=one) for _ in range(TOGETHER)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    return tally(found)


def tasks(peer: Peer, url: str) -> dict[str, Any]:
    from openai import AsyncOpenAI

    amake = peer.amake
    if amake is None:
        return {"became": {}}

    async def all_of_them() -> list[Any]:
        async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            with amake(client, CAP) as call:
                return await asyncio.gather(*(call() for _ in range(TOGETHER)), return_exceptions=True)

    return tally(asyncio.run(all_of_them()))


def added(peer: Peer, _: str) -> dict[str, Any]:
    """The microseconds of processor of a guarded call beyond those of the same call unguarded: the median of the rounds."""
    taken: dict[str, list[float]] = {"plain": [], "guarded": []}

    def turn(name: str, call: Callable[[], object]) -> None:
        for _ in range(3):
            call()
        begun = time.process_time_ns()
        for _ in range(CALLS):
            call()
        taken[name].append((time.process_time_ns() - begun) / CALLS / 1_000)

    for _ in range(ROUNDS):
        turn("plain", (peer.plain or create)(in_memory()))
        with peer.make(in_memory(), 1_000.0) as call:
            turn("guarded", call)
    more = (guarded - plain for plain, guarded in zip(taken["plain"], taken["guarded"], strict=True))
    return {"plain_us": statistics.median(taken["plain"]), "added_us": statistics.median(more)}


def in_memory() -> Any:
    """OpenAI's client, answered before anything reaches a wire."""
    import openai
    from openai import OpenAI

    httpx = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=ANSWER))
    return OpenAI(api_key="any", max_retries=0, http_client=httpx.Client(transport=transport))


def apart(name: str, scenario: str, url: str) -> dict[str, Any]:
    """One scenario in a process and a folder of its own. Its answer, or what went wrong."""
    with tempfile.TemporaryDirectory(prefix="bursar-peer-") as folder:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--one", name, scenario, url]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return {"wrong": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(peer: Peer) -> dict[str, Any]:
    """A peer's row: calls that the provider billed in each scenario, and what a guarded call costs."""
    row: dict[str, Any] = {"peer": peer.name}
    for scenario in SCENARIOS:
        with Provider(Answer(input_tokens=1_000, output_tokens=500), latency_s=0.15) as provider:
            found = apart(peer.name, scenario, f"{provider.url}/v1")
            provider.wait_idle()
            row[scenario] = found.get("added_us") if scenario == "added" else provider.billed_calls
        became = found.get("became")
        if "wrong" in found or became == {}:
            row[scenario] = None
        print(f"{peer.name}, {scenario}: {found}", file=sys.stderr)
    return row


def shown(row: dict[str, Any], scenario: str) -> str:
    return "-" if row[scenario] is None else f"{row[scenario]:.0f}"


def main() -> None:
    said = options(only="")
    rows, missing = [], []
    for peer in PEERS:
        if said.only.lower() in peer.name.lower():
            try:
                row = {"version": version(peer.package)} | measured(peer)
            except PackageNotFoundError:
                missing.append(peer.package)
            else:
                rows.append(row)
    table(
        f"A cap for {FITS} calls: calls that were billed, and what a guarded call costs",
        (
            "peer",
            "version",
            f"1 caller, {ALONE} tries",
            f"{TOGETHER} threads",
            f"{TOGETHER} tasks",
            "us of processor a call",
        ),
        [(row["peer"], row["version"], *(shown(row, scenario) for scenario in SCENARIOS)) for row in rows],
    )
    if missing:
        print(f"\nNot installed: {', '.join(missing)}.")
    save(said.json, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        name, scenario, url = sys.argv[2:]
        os.environ |= {"OPENAI_API_KEY": "any", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        (peer,) = (peer for peer in PEERS if peer.name == name)
        print("\n" + json.dumps(globals()[scenario](peer, url)))
    else:
        main()
