"""The contract of adapters: what every adapter must do, as a pytest class that its tests derive from."""

from __future__ import annotations

from bursar.testing.adapter_contract.agents import Agents
from bursar.testing.adapter_contract.faults import Faults
from bursar.testing.adapter_contract.gate import Gate
from bursar.testing.adapter_contract.together import Together

__all__ = ["AdapterContract"]


class AdapterContract(Gate, Faults, Together, Agents):
    """Derive a test class, supply `install` and the calls, and run it with pytest.

    The calls go to an OpenAI-compatible provider on `url` (its base URL is `url + "/v1"`) for the model gpt-4o, without
    retries of the client's own unless `retries` says so. `max_tokens` is the request's maximum output, `timeout_s` the
    client's time-out, `n` the number of answers. Streams yield their chunks lazily, and usage is switched on by the
    adapter or by the call where the framework leaves it off. Features that a framework does not have are named in
    `lacks`: "n", "agent", "embed", "retries", "cache", "fallback", or a call style.
    """
