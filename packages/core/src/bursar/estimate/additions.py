"""What a provider adds to a request on its side: its own tools, stored conversations, routing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from bursar.estimate.measure import OBJECT, words

# Anthropic, "Handling stop reasons", pause_turn: the server's loop stops after 10 rounds.
_ANTHROPIC_ROUNDS = 10
# Tools that run at the caller's; everything of another type is taken for the provider's own.
_CLIENT_TYPES = words("function custom namespace computer computer_use computer_use_preview local_shell apply_patch")
_ANTHROPIC_CLIENT = ("bash_", "text_editor_", "computer_", "memory_")
_GEMINI_CLIENT = frozenset(("functionDeclarations", "function_declarations", "computerUse", "computer_use"))
_TOOL_LISTS = ("tools", "functions", "toolConfig", "tool_config", "mcp_servers")
# Settings that make the provider search, read or compact by itself.
_SETTINGS = words(
    """
    web_search_options search_parameters search_settings plugins connectors data_sources
    retrieveAndGenerateConfiguration retrievalQuery agent mcp_servers enable_search
    """
)
_STORED = ("previous_response_id", "conversation", "cachedContent", "cached_content", "container", "variables")
_SEARCHING = ("-search-preview", "-search-api", "deep-research", "sonar", "compound", ":online")
# All that is looked at in a body: most have nothing of it, and then the names say everything.
_LOOKED_AT = frozenset((*_TOOL_LISTS, *_SETTINGS, *_STORED)) | words(
    "context_management reasoning prompt models max_tool_calls max_turns"
)
_ROUTED = ("auto", "openrouter/auto", "model-router", "switchpoint/router", "openrouter/fusion", "openrouter/free")


class Additions(NamedTuple):
    """`tools`: declared by the caller; `hidden`: those of them for which the provider writes a prompt; `server`: the
    provider's own.

    `rounds`: how often the model is run at most, `uses`: how often its own tools are used in all, each None where nothing
    limits it; `stored`, `routed`: the reason in words, or empty.
    """

    tools: int = 0
    hidden: int = 0
    server: tuple[str, ...] = ()
    rounds: int | None = 1
    uses: int | None = 0
    stored: str = ""
    routed: str = ""


def read_additions(provider: str, model: str, endpoint: str, body: Mapping[str, Any]) -> Additions:
    """Find all by which the provider would put more into the prompt, or run the model more than once."""
    if _LOOKED_AT.isdisjoint(body):
        return _by_name(provider, model, endpoint)
    return _read(provider, model, endpoint, body)


@lru_cache(maxsize=4_096)
def _by_name(provider: str, model: str, endpoint: str) -> Additions:
    return _read(provider, model, endpoint, {})


def _read(provider: str, model: str, endpoint: str, body: Mapping[str, Any]) -> Additions:
    tools = hidden = 0
    server: list[str] = []
    uses: list[int | None] = []
    anthropic = "anthropic" in provider or "claude" in model
    for tool in _tools(body):
        name, client = _tool(tool, anthropic)
        if client:
            tools += max(1, len(_declarations(tool)))
            hidden += name != ""
        else:
            server.append(name)
            uses.append(tool.get("max_uses") if isinstance(tool.get("max_uses"), int) else None)
    if not _SETTINGS.isdisjoint(body):
        server += sorted(name for name in _SETTINGS if body.get(name))
    server += [f"the model {model!r}" for part in _SEARCHING if part in model]
    if provider == "perplexity":
        server.append("its search")
    if _compacts(body):
        server.append("compaction")
    reasoning = body.get("reasoning")
    if (
        reasoning is not None
        and isinstance(reasoning, OBJECT)
        and reasoning.get("mode") not in (None, "standard", "default")
    ):
        server.append(f"the reasoning mode {reasoning['mode']!r}")  # `pro` was billed 20 times the request's bytes
    found = Additions(tools, hidden, stored=_stored(endpoint, body), routed=_routed(model, body))
    if not server:
        return found
    rounds = _rounds(body, server, uses, anthropic)
    return found._replace(server=tuple(server), rounds=rounds, uses=_uses(body, server, uses))


def _stored(endpoint: str, body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if prompt is not None and isinstance(prompt, OBJECT):
        return "a stored prompt"
    for name in reversed(_STORED):
        if body.get(name):
            return f"`{name}`"
    return f"the endpoint {endpoint!r}" if "compact" in endpoint or "agent" in endpoint else ""


def _routed(model: str, body: Mapping[str, Any]) -> str:
    if model in _ROUTED or model.endswith("/auto"):
        return f"{model!r} lets the provider choose the model"
    return "`models` lets the provider choose the model" if body.get("models") else ""


def _tools(body: Mapping[str, Any]) -> Iterator[Any]:
    for key in _TOOL_LISTS:
        value = body.get(key)
        if value is None:
            continue
        if isinstance(value, OBJECT):  # Gemini also takes one tool that stands alone
            value = [value] if key == "tools" else value.get("tools")
        if isinstance(value, (list, tuple)) and key != "mcp_servers":
            yield from value


def _declarations(tool: Any) -> tuple[Any, ...]:
    if isinstance(tool, Mapping):
        for key in ("functionDeclarations", "function_declarations", "tools"):
            if isinstance(tool.get(key), (list, tuple)):
                return tuple(tool[key])
    return ()


def _tool(tool: Any, anthropic: bool) -> tuple[str, bool]:
    """Its name, and whether the caller runs it; a client tool has a name only where the provider writes its prompt."""
    if not isinstance(tool, Mapping):
        return "", True  # an SDK's or framework's tool object is the caller's own
    kind = tool.get("type")
    if isinstance(kind, str):
        if kind == "tool_search" and tool.get("execution") == "client":
            return "", True
        if anthropic and kind.startswith(_ANTHROPIC_CLIENT):
            return kind, True
        return ("" if kind in ("function", "custom", "namespace") else kind), kind in _CLIENT_TYPES
    keys = set(tool)
    if keys & {"function", "toolSpec", "input_schema", "parameters", "parameter_definitions", "cachePoint"}:
        return "", True
    if keys & _GEMINI_CLIENT:
        other = sorted(keys - _GEMINI_CLIENT)
        return (other[0], False) if other else ("", True)
    if "name" in keys and not isinstance(tool.get("name"), Mapping):
        return "", "systemTool" not in keys
    return (min(keys) if keys else ""), not keys


def _compacts(body: Mapping[str, Any]) -> bool:
    management = body.get("context_management")
    if management is None:
        return False
    edits = management.get("edits") if isinstance(management, OBJECT) else management
    return isinstance(edits, (list, tuple)) and any(
        "compact" in str(edit.get("type")) for edit in edits if isinstance(edit, Mapping)
    )


def _uses(body: Mapping[str, Any], server: list[str], uses: list[int | None]) -> int | None:
    """How often the provider's tools are used at most, in all; turns (xAI) may hold several uses each."""
    limit = body.get("max_tool_calls")
    if isinstance(limit, int) and limit >= 0:
        return limit
    limits = [use for use in uses if use is not None]
    return sum(limits) if len(limits) == len(server) else None


def _rounds(body: Mapping[str, Any], server: list[str], uses: list[int | None], anthropic: bool) -> int | None:
    """How often the model runs at most, by OpenAI's `max_tool_calls`, xAI's `max_turns`, Anthropic's `max_uses`."""
    for name in ("max_tool_calls", "max_turns"):
        limit = body.get(name)
        if isinstance(limit, int) and limit >= 0:
            return limit + 1
    if not anthropic or len(uses) != len(server) or any(name.startswith("advisor") for name in server):
        return None
    limits = [use for use in uses if use is not None]
    return min(_ANTHROPIC_ROUNDS, sum(limits) if len(limits) == len(uses) else _ANTHROPIC_ROUNDS) + 1
