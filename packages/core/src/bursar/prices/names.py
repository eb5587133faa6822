"""Names: the spellings of providers, and the ways in which a model's name is decorated by hosts, gateways and snapshots."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

# How frameworks, gateways and SDKs spell a provider -> the name in the price book. Underscores and blanks are read as hyphens.
_PROVIDERS = {
    "openai": "openai text-completion-openai openai-chat openai-responses openai-codex chatopenai",
    "azure": "azure-openai azure-ai azure-ai-inference azure-ai-foundry azure-text azureopenai azurechatopenai "
    "az.ai.inference az.ai.openai",
    "anthropic": "chatanthropic claude",
    "google": "google-gla google-genai gemini google-ai-studio google-ai google-generativeai google-generative-ai gcp.gemini "
    "gcp.gen-ai chatgooglegenerativeai googleai",
    "vertex": "google-vertex vertex-ai vertexai google-vertexai gcp.vertex-ai google-anthropic-vertex anthropic-vertex "
    "chatvertexai vertex-ai-language-models vertex-ai-beta",
    "bedrock": "aws aws-bedrock amazon-bedrock amazon bedrock-converse bedrock-mantle aws.bedrock bedrock-agent anthropic-bedrock "
    "chatbedrock chatbedrockconverse amazon-nova",
    "mistral": "mistralai mistral-ai codestral text-completion-codestral chatmistralai",
    "xai": "x-ai x.ai grok chatxai",
    "deepseek": "deepseek-ai chatdeepseek",
    "together": "together-ai togetherai",
    "fireworks": "fireworks-ai fireworksai",
    "cohere": "cohere-chat cohereai chatcohere",
    "huggingface": "hf hugging-face huggingface-hub",
    "voyageai": "voyage voyage-ai",
    "zai": "z-ai z.ai zhipu-ai",
    "moonshotai": "moonshot moonshot-ai",
    "perplexity": "perplexity-ai pplx chatperplexity",
    "groq": "chatgroq",
    "openrouter": "open-router chatopenrouter",
    "ollama": "ollama-chat chatollama",
    "vercel": "vercel-ai-gateway",
    "novita": "novita-ai",
    "dashscope": "alibaba qwen",
    "gateway": "portkey helicone litellm chatlitellm litellm-proxy cloudflare-ai-gateway",
}
_CANONICAL = {spelling: name for name, spellings in _PROVIDERS.items() for spelling in (name, *spellings.split())}

# Who sells whose models at the same price: where a provider has no row of its own, these are asked.
# Azure, Vertex and OpenRouter publish that they pass their partners' list prices through; Hugging Face bills its partners' rates.
FALLBACKS = {
    "azure": ("openai", "anthropic", "deepseek", "xai", "mistral", "cohere", "moonshotai"),
    "vertex": ("google", "anthropic"),
    "gateway": ("openai", "anthropic", "google", "mistral", "xai", "deepseek", "groq", "cohere"),
}
_VENDORS = {
    "openai": "openai", "anthropic": "anthropic", "google": "google", "x-ai": "xai", "mistralai": "mistral", "deepseek": "deepseek",
    "cohere": "cohere", "perplexity": "perplexity", "moonshotai": "moonshotai", "z-ai": "zai",
}  # fmt: skip
_BY_VENDOR = frozenset({"azure", "vertex", "bedrock", "google"})  # hosts that put the vendor's name before the model's
_HUGGING_FACE_PARTNERS = {
    "cerebras", "cohere", "fireworks-ai", "groq", "hyperbolic", "nebius", "novita", "nscale", "ovhcloud", "publicai", "sambanova",
    "together", "zai-org", "featherless-ai",
}  # fmt: skip

_REGIONS = r"(?:us|eu|apac|au|jp|in|ca|sa|uk|me|af|us-gov)"
_DATE = r"20\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|20\d{2}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
_SHORT = (
    r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|2[3-9](?:0[1-9]|1[0-2])"  # 0613: month and day; 2411: year and month
)
_SNAPSHOT = re.compile(
    rf"(?:[-@](?:{_DATE}|{_SHORT}|latest|default|00[1-9])"
    r"|-(?:preview|exp)-(?:(?:0[1-9]|1[0-2])-(?:20)?\d{2})"
    r"|(?<=preview)-(?:0[1-9]|1[0-2])-(?:20)?\d{2})$"
)
_BEDROCK_VERSION = re.compile(r"(?:-v\d+(?::\d+)?|:\d+)(?::(?:\d+k|mm))?$")
_STAGE = re.compile(r"-(?:preview|exp)$")
_FINE_TUNED = re.compile(r"^(?:ft:([^:]+):.*|([^:]+?)\.ft-.*)$")
_DEPLOYMENT = re.compile(
    r"-(?:global|data-?zone)(?:-standard|-batch)?$"
)  # how Azure names what the price of the model covers
_ROUTES = re.compile(r":(?:online|nitro|floor|exacto)$")  # how OpenRouter picks a host; the price is the model's

_RULES = ((_ROUTES, "openrouter"), (_DEPLOYMENT, "azure"), (_BEDROCK_VERSION, "bedrock"), (_SNAPSHOT, None))


@lru_cache(maxsize=4_096)
def provider_name(provider: str) -> str:
    """The price book's name for any spelling of a provider: `google_genai` -> `google`, `vertex_ai` -> `vertex`."""
    plain = re.sub(r"[\s_]+", "-", provider.strip().lower())
    found = _CANONICAL.get(plain)
    if found is None and plain.startswith("vertex-ai-"):  # LiteLLM: vertex_ai-anthropic_models
        found = "vertex"
    return found or plain


def places(provider: str, model: str) -> Iterator[tuple[str, str]]:
    """Where to look for a model, in order: (provider, exact name in its table). The first that exists is the model's price.

    A name is only ever stripped of decorations that change no price (paths, regions' profiles, versions, snapshots' dates);
    what is left must be a whole name of the table, so an invented model is never taken for a known one.
    """
    host, name = provider_name(provider), re.sub(r"\s+", "", model.lower())
    seen: set[tuple[str, str]] = set()
    for place in _places(host, name):
        if place not in seen:
            seen.add(place)
            yield place


def _places(host: str, name: str) -> Iterator[tuple[str, str]]:
    first, _, rest = name.partition("/")
    if rest and host != "openrouter" and provider_name(first) != host and first in _CANONICAL and _routed(host, first):
        # A LiteLLM name, `anthropic/claude-...`, asked of a gateway: its own prefix names who bills it.
        yield from _places(provider_name(first), rest)
    forms = list(_forms(host, name))
    for form in forms:
        yield host, form
    if host == "openrouter":
        for form in forms:
            vendor, _, plain = form.partition("/")
            if plain and vendor in _VENDORS and ":" not in plain:
                yield _VENDORS[vendor], plain
                yield _VENDORS[vendor], plain.replace(".", "-")
    if host == "huggingface":
        base, _, partner = name.rpartition(":")
        if partner in _HUGGING_FACE_PARTNERS and base:
            yield from _places(f"huggingface-{partner}", base)
    elif host.startswith("huggingface-"):
        yield from _places(provider_name(host.removeprefix("huggingface-")), name)
    for other in FALLBACKS.get(host, ()):
        for form in forms:
            yield other, form


def _routed(host: str, first: str) -> bool:
    return host == "gateway" or provider_name(first) == host


def _forms(host: str, name: str) -> Iterator[str]:
    """The name as given, then with one decoration after another taken off."""
    whole = [name]
    if name.startswith("arn:"):
        whole.append(name.rpartition("/")[2])
    first, _, rest = name.partition("/")
    if rest and provider_name(first) == host:  # LiteLLM's provider/model
        whole.append(rest)
    for prefix in ("models/", "tunedmodels/"):
        if whole[-1].startswith(prefix):
            whole.append(whole[-1].removeprefix(prefix))
    if "/models/" in whole[-1]:  # projects/p/locations/l/publishers/google/models/m
        whole.append(whole[-1].rpartition("/models/")[2])
    first, _, rest = whole[-1].partition("/")
    if rest and first in _VENDORS and host in _BY_VENDOR:
        whole.append(rest)
    tuned = _FINE_TUNED.match(whole[-1])
    if tuned:
        whole.append(f"ft:{tuned[1] or tuned[2]}")
    for form in dict.fromkeys(whole):
        yield from _stripped(host, form)
    region = re.match(rf"(?:{_REGIONS}|global)\.(.+)", whole[-1]) if host == "bedrock" else None
    if region:  # no price of its own: the model's
        yield from _stripped(host, region[1])


def _stripped(host: str, name: str) -> Iterator[str]:
    """A whole name, then without version, date and stage; on Bedrock also under the regional profile that stands for it."""
    heads = [name]
    if host == "bedrock" and not name.startswith("global."):
        region = re.match(rf"{_REGIONS}\.(.+)", name)
        heads.append(f"regional.{region[1] if region else name}")
    yield from heads
    rules = [rule for rule, where in _RULES if where in (None, host)]
    for head in heads:
        form, dated = head, False
        for _ in range(4):  # route or deployment, version, date, stage: no name carries more
            rule = next((rule for rule in rules if rule.search(form)), _STAGE if dated else None)
            if rule is None or not (shorter := rule.sub("", form)) or shorter == form:
                break
            dated = dated or rule is _SNAPSHOT
            form = shorter
            yield form


def bedrock_base(name: str) -> str:
    """A Bedrock name without its version: `anthropic.claude-v2:1` is a name, `...-20250929-v1:0` a version of one."""
    return _BEDROCK_VERSION.sub("", name)
