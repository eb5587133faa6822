"""What guarding adds to LlamaIndex: calls and an agent with the guard installed against the same without it, in turns."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAI
from llama_index_instrumentation import root_dispatcher
from measure import at_most, in_turns, provider, table

from bursar import Budget, Bursar
from bursar_llamaindex import BursarCallbackHandler

PROMPT = " ".join(["cat"] * 1_000)  # 4,000 bytes
MESSAGES = [ChatMessage(role="user", content=PROMPT)]
BUDGETS = [
    Budget("run", limit="100_000 USD", per="run"),
    Budget("team", limit="100_000 USD", per="team"),
    Budget("month", limit="1_000_000 USD", window="month"),
    Budget("rate", limit="100_000_000 requests/minute"),
]
STORES = {
    "memory": "memory:",
    "sqlite, process": "sqlite:///{}/process.db?durability=process",
    "sqlite, full": "sqlite:///{}/full.db",
}
UNLIMITED = "sqlite, full"  # what an fsync takes is the disk's doing
LIMIT_MS = 0.5
ROUNDS = 200


class Subject:
    """An LLM, and an agent over it, with the hooks that LlamaIndex calls meanwhile."""

    def __init__(self, llm: OpenAI) -> None:
        self.llm = llm
        self.agent = FunctionAgent(name="reader", llm=llm, tools=[], timeout=None)
        self.span_handlers = list(root_dispatcher.span_handlers)

    async def run_agent(self) -> None:
        await self.agent.run(PROMPT)

    async def astream_chat(self) -> None:
        async for _ in await self.llm.astream_chat(MESSAGES):
            continue


WAYS: dict[str, Callable[[Subject, asyncio.AbstractEventLoop], object]] = {
    "chat": lambda on, loop: on.llm.chat(MESSAGES),
    "stream_chat": lambda on, loop: list(on.llm.stream_chat(MESSAGES)),
    "achat": lambda on, loop: loop.run_until_complete(on.llm.achat(MESSAGES)),
    "astream_chat": lambda on, loop: loop.run_until_complete(on.astream_chat()),
    "FunctionAgent.run": lambda on, loop: loop.run_until_complete(on.run_agent()),
}


def llm_at(url: str, **options: CallbackManager) -> OpenAI:
    return OpenAI(model="gpt-4o", api_base=f"{url}/v1", api_key="local", max_tokens=50, **options)


def measured(name: str, plain: Subject, guarded: Subject, loop: asyncio.AbstractEventLoop) -> tuple[float, float]:
    """The milliseconds of one call without the guard, and what the guard adds."""

    def work(on: Subject) -> None:
        root_dispatcher.span_handlers = on.span_handlers
        WAYS[name](on, loop)

    found = in_turns({"plain": lambda: work(plain), "guarded": lambda: work(guarded)}, 1, rounds=ROUNDS)
    return found["plain"] / 1_000, (found["guarded"] - found["plain"]) / 1_000


def main() -> None:
    rows = []
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder, provider() as url:
        plain = Subject(llm_at(url))
        for store, address in STORES.items():
            with Bursar(address.format(folder), budgets=BUDGETS) as bursar:
                manager = CallbackManager([BursarCallbackHandler(bursar, team="research")])
                guarded = Subject(llm_at(url, callback_manager=manager))
                for name in WAYS:
                    plain_ms, added_ms = measured(name, plain, guarded, loop)
                    figure = "" if store == UNLIMITED else at_most(added_ms, LIMIT_MS, " ms")
                    rows.append((store, name, f"{plain_ms:.2f}", f"{added_ms:.2f}", figure))
    loop.close()
    columns = ("store", "way", "without a guard, ms", "what the guard adds, ms", "figure")
    table("Guarded over unguarded: LlamaIndex over HTTP, four accounts, medians", columns, rows)


if __name__ == "__main__":
    main()
