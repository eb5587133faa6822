"""The upper bound of a call before it is sent: never exceeded, or refused with the reason."""

from __future__ import annotations

from typing import NamedTuple

from bursar.errors import UnboundedEstimate
from bursar.estimate.media import bound_tokens
from bursar.estimate.request import Request

# Every token of the tokenizers in use (byte-level BPE, SentencePiece with byte fallback) stands for at least one byte
# of the rendered prompt, and what a chat template writes per message is shorter than the JSON around it. So bytes as
# sent bound the tokens, but for what the provider writes itself. Largest seen in 2,700 recorded answers, over the
# bytes: without tools 155 (xAI), with tools 602 (Nova; Anthropic publishes up to 530), with one of Anthropic's own
# client tools 1,459 (memory).
REQUEST_OVERHEAD = 320
MESSAGE_OVERHEAD = 8
TOOLS_OVERHEAD = 1_280
TOOL_OVERHEAD = 64
HIDDEN_PROMPT_OVERHEAD = 2_560


class Estimate(NamedTuple):
    """What one call may use before it is sent: totals over all its answers and, in strict mode, over the client's own
    retries.

    `max_output_tokens`: the output counted for one answer; `answers`: how many are counted (n x attempts x rounds). `basis`
    says in words where the figures come from.
    """

    input_tokens: int
    output_tokens: int
    max_output_tokens: int
    answers: int
    strict: bool
    basis: str


def strict(request: Request, *, context_window: int | None = None, max_output_tokens: int | None = None) -> Estimate:
    """The most tokens that `request` can be billed, given the model's `context_window` and its largest output.

    Raises UnboundedEstimate where nothing bounds it, with `reason`, and the remedy in the last sentence.
    """
    reason = request.unbounded_reason
    if reason is not None:
        raise _unbounded(
            request,
            reason,
            "Set a limit on its rounds (max_uses, max_tool_calls), give input_tokens, or use the"
            " learned estimate for this budget.",
        )
    rounds = request.additions.rounds or 1
    output = output_bound(request, max_output_tokens, context_window)
    attempts = request.retries + 1
    tokens, basis = _input_bound(request, context_window)
    return Estimate(
        input_tokens=tokens * rounds * attempts,
        output_tokens=output * rounds * request.n * attempts,
        max_output_tokens=output,
        answers=request.n * attempts * rounds,
        strict=True,
        basis=basis if rounds == 1 else f"{basis} x {rounds} rounds",
    )


def output_bound(request: Request, max_output_tokens: int | None, context_window: int | None = None) -> int:
    """The most tokens of one answer: the enforced maximum, else the model's, else its context window.

    Raises UnboundedEstimate where none of them is known.
    """
    if request.embeds:
        return 0
    enforced = request.max_output_tokens
    if enforced is not None and request.limit_covers_reasoning:
        return enforced + request.prediction_bytes
    most = max_output_tokens if max_output_tokens is not None else context_window
    if most is None:
        raise _unbounded(
            request,
            "the request sets no maximum output, and none is known for the model"
            if enforced is None
            else "xAI's max_tokens does not limit the reasoning, and no maximum is known for the model",
            "Set max_output_tokens on the call, or the model's maximum in an override.",
        )
    return (enforced or 0) + most + request.prediction_bytes


def text_bound(request: Request) -> int:
    """The most tokens of what the request itself holds as text, tools and tool data."""
    added = request.additions
    tokens = request.size + REQUEST_OVERHEAD + MESSAGE_OVERHEAD * request.messages
    if added.tools:
        tokens += TOOLS_OVERHEAD + TOOL_OVERHEAD * added.tools + HIDDEN_PROMPT_OVERHEAD * added.hidden
    return tokens


def _input_bound(request: Request, context_window: int | None) -> tuple[int, str]:
    if request.input_tokens is not None:
        return request.input_tokens, "the caller's count"
    if request.kind in ("text", "media"):
        bounds = [bound_tokens(item, request.family, request.model.lower()) for item in request.media]
        known = [bound for bound in bounds if bound is not None]
        if len(known) == len(
            bounds
        ):  # never cut to the context window: embeddings take one window a text, and tables err
            return text_bound(request) + sum(known), "bytes of the request" + (
                " and the published maxima of its media" if known else ""
            )
    if context_window is not None and not request.embeds:
        return context_window, "the model's context window"
    reason = {
        "server_tools": "the provider runs tools on its side",
        "stored": f"the input comes from {request.stored}, which the provider keeps",
        "unmeasured": "neither the messages nor their count are known",
    }.get(request.kind, "a document, film or link has no published maximum")
    raise _unbounded(
        request,
        f"{reason}, and the model's context window is not known",
        "Give input_tokens, or the model's context window in an override.",
    )


def _unbounded(request: Request, reason: str, remedy: str) -> UnboundedEstimate:
    return UnboundedEstimate(
        f"No upper bound exists for this call of {request.provider} {request.model!r}: {reason}. {remedy}",
        reason=reason,
        provider=request.provider,
        model=request.model,
    )
