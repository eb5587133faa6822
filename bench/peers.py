"""Budgets that others make, and Bursar, each used as its documentation says: a cap in dollars around one call of gpt-4o.

Each is a context that yields a guarded call: `make(client, cap)` for threads, `amake(client, cap)` for tasks, or None where there
is none. `client` is OpenAI's; a call that is refused raises.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

Call = Callable[[], object]
Acall = Callable[[], Awaitable[object]]
PRICE = 0.0075  # of one call: 1,000 tokens in, 500 out
SAID: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "cat " * 1_000}],
    "max_tokens": 500,
}
USER = "a user"


class Refused(Exception):
    """What a peer that answers instead of raising is taken to say."""


class Peer(NamedTuple):
    """`package`: as it is installed. `plain`: the same call without a guard, where it is not simply the client's."""

    name: str
    package: str
    make: Callable[[Any, float], AbstractContextManager[Call]]
    amake: Callable[[Any, float], AbstractContextManager[Acall]] | None = None
    plain: Callable[[Any], Call] | None = None


def create(client: Any) -> Call:
    """The call itself."""
    return lambda: client.chat.completions.create(**SAID)


def bursar(store: str, **options: Any) -> Callable[[Any, float], Any]:
    @contextmanager
    def make(client: Any, cap: float) -> Iterator[Call]:
        from bursar import Budget, Bursar

        with Bursar(store, [Budget("cap", f"{cap} USD", **options)]) as guard:
            yield create(guard.wrap(client))

    return make


@contextmanager
def shekel(client: Any, cap: float) -> Iterator[Call]:
    from shekel import budget  # type: ignore[import-not-found]

    with budget(max_usd=cap):
        yield create(client)


@contextmanager
def agentbudget(client: Any, cap: float) -> Iterator[Call]:
    import agentbudget as peer  # type: ignore[import-not-found]

    with peer.AgentBudget(cap, max_repeated_calls=10**9).session() as session:
        yield create(peer.wrap_client(client, session))


def tokenfence(client: Any, cap: float) -> AbstractContextManager[Call]:
    from tokenfence import guard  # type: ignore[import-not-found]

    return nullcontext(create(guard(client, budget=cap, on_limit="raise")))


def atokenfence(client: Any, cap: float) -> AbstractContextManager[Acall]:
    from tokenfence import async_guard

    return nullcontext(create(async_guard(client, budget=cap, on_limit="raise")))  # type: ignore[arg-type]


def agent_budget_guard(client: Any, cap: float) -> AbstractContextManager[Call]:
    # it counts by a table that tiktoken downloads at its first use; LiteLLM brings the same one
    spec = find_spec("litellm")
    if spec is not None and spec.origin is not None:
        os.environ["TIKTOKEN_CACHE_DIR"] = f"{os.path.dirname(spec.origin)}/litellm_core_utils/tokenizers"
    from agent_budget_guard import BudgetedSession  # type: ignore[import-not-found]

    return nullcontext(create(BudgetedSession(budget_usd=cap).wrap_openai(client)))


@contextmanager
def veronica(client: Any, cap: float) -> Iterator[Call]:
    from veronica_core import ExecutionConfig, ExecutionContext, WrapOptions  # type: ignore[import-not-found]

    config = ExecutionConfig(max_cost_usd=cap, max_steps=10**9, max_retries_total=10)
    options = WrapOptions(cost_estimate_hint=PRICE)  # exact, told by the caller
    with ExecutionContext(config=config) as context:

        def call() -> None:
            if context.wrap_llm_call(fn=create(client), options=options).name != "ALLOW":
                raise Refused

        yield call


def _litellm(client: Any) -> Any:
    import litellm  # type: ignore[import-not-found]

    return litellm, {**SAID, "client": client}


def _manager(cap: float) -> Any:
    from litellm import BudgetManager

    os.chdir(tempfile.mkdtemp(dir="."))  # its file, which a thread still writes, is read half written by the next one
    manager = BudgetManager(project_name="bench")
    manager.create_budget(total_budget=cap, user=USER)
    return manager


def litellm(client: Any, cap: float) -> AbstractContextManager[Call]:
    peer, said = _litellm(client)
    manager = _manager(cap)

    def call() -> None:
        if manager.projected_cost("gpt-4o", SAID["messages"], USER) > manager.get_total_budget(USER):
            raise Refused
        manager.update_cost(completion_obj=peer.completion(**said), user=USER)

    return nullcontext(call)


def alitellm(client: Any, cap: float) -> AbstractContextManager[Acall]:
    peer, said = _litellm(client)
    manager = _manager(cap)

    async def call() -> None:
        if manager.projected_cost("gpt-4o", SAID["messages"], USER) > manager.get_total_budget(USER):
            raise Refused
        manager.update_cost(completion_obj=await peer.acompletion(**said), user=USER)

    return nullcontext(call)


def plain_litellm(client: Any) -> Call:
    peer, said = _litellm(client)
    return lambda: peer.completion(**said)


def _agent(client: Any, calls: int | None) -> tuple[Any, tuple[dict[str, Any], dict[str, Any]]]:
    """An agent without tools, so that each run of it is one call; None: without a limit."""
    from langchain.agents import create_agent
    from langchain.agents.middleware import ModelCallLimitMiddleware
    from langchain_openai import ChatOpenAI
    from langgraph.checkpoint.memory import InMemorySaver

    one: dict[str, Any] = {"model": "gpt-4o", "max_tokens": 500, "max_retries": 0, "api_key": "any"}
    name = "async_client" if type(client).__name__.startswith("Async") else "client"
    model = ChatOpenAI(**one, base_url=str(client.base_url), **{name: client.chat.completions})
    limit = [] if calls is None else [ModelCallLimitMiddleware(thread_limit=calls, exit_behavior="error")]
    agent = create_agent(model, middleware=limit, checkpointer=InMemorySaver())
    return agent, ({"messages": SAID["messages"]}, {"configurable": {"thread_id": "one"}})


def langchain(client: Any, cap: float) -> AbstractContextManager[Call]:
    agent, said = _agent(client, int(cap / PRICE))
    return nullcontext(lambda: agent.invoke(*said))


def alangchain(client: Any, cap: float) -> AbstractContextManager[Acall]:
    agent, said = _agent(client, int(cap / PRICE))
    return nullcontext(lambda: agent.ainvoke(*said))


def plain_langchain(client: Any) -> Call:
    agent, said = _agent(client, None)
    return lambda: agent.invoke(*said)


_MEMORY, _PROCESS = bursar("memory:", on_exceed="wait"), bursar("sqlite:///cap.db?durability=process", on_exceed="wait")
PEERS = (
    Peer("Bursar, memory", "bursar", bursar("memory:"), bursar("memory:")),
    Peer("Bursar, memory, callers wait", "bursar", _MEMORY, _MEMORY),
    Peer("Bursar, SQLite process, callers wait", "bursar", _PROCESS, _PROCESS),
    Peer("shekel", "shekel", shekel, shekel),  # type: ignore[arg-type]
    Peer("agentbudget", "agentbudget", agentbudget, agentbudget),  # type: ignore[arg-type]
    Peer("tokenfence", "tokenfence", tokenfence, atokenfence),
    Peer("agent-budget-guard", "agent-budget-guard", agent_budget_guard),
    Peer("veronica-core, told the exact cost", "veronica-core", veronica),
    Peer("LiteLLM's BudgetManager", "litellm", litellm, alitellm, plain_litellm),
    Peer("LangChain's ModelCallLimit, 10 calls", "langchain", langchain, alangchain, plain_langchain),
)
