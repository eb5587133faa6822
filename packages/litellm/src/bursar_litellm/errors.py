"""The refusal as LiteLLM meets it: no retry of the Router takes it up, and the proxy answers it with 402."""

from __future__ import annotations

from typing import Any

from bursar.errors import ApprovalRequired, BudgetExceeded, BursarError, Stopped, StoreError, UnboundedEstimate

# What costs money later, or elsewhere, than in the answer to the call.
UNBOUNDED = {
    "create_batch": "a batch is billed when it has run",
    "create_fine_tuning_job": "training is billed when it has run",
    "create_run": "an evaluation is billed when it has run",
    "agent_interaction": "an agent is billed when it has ended",
    "run_thread": "a run of an assistant is billed when it has ended",
    "run_thread_stream": "a run of an assistant is billed when it has ended",
    "_realtime": "a live session has no end that is known before",
    "_responses_websocket": "a live session has no end that is known before",
    "create_realtime_client_secret": "a live session has no end that is known before",
    "create_realtime_transcription_session": "a live session has no end that is known before",
    "realtime_calls": "a live session has no end that is known before",
    "upload_passed_on": "the proxy shows nothing of an upload that it passes on; its own route for it is held",
    "video_generation": "a film is billed by the second, when it is made",
    "create_video": "a film is billed by the second, when it is made",
    "video_remix": "a film is billed by the second, when it is made",
    "video_edit": "a film is billed by the second, when it is made",
    "video_extension": "a film is billed by the second, when it is made",
}


class LiteLLMBudgetExceeded(BudgetExceeded):
    """A budget refused the call; nothing was sent. The fields are those of `bursar.BudgetExceeded`.

    The attributes are those that LiteLLM reads of any error: `status_code` 402, which its Router does not retry, and what
    its proxy puts into the answer. A fallback is another call: it is sent if it fits.
    """

    status_code = 402
    code = "402"
    type = "budget_exceeded"
    param = "budget"
    llm_provider = ""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.message = message  # LiteLLM's Router adds to it which deployments were tried


class LiteLLMApprovalRequired(LiteLLMBudgetExceeded, ApprovalRequired):
    """A budget asks an operator before more is spent. Field `id`: for `bursar approve ID`."""


class LiteLLMStopped(LiteLLMBudgetExceeded, Stopped):
    """The agent was stopped by a switch, a budget's kill or a detector. Fields: `cause`, `why`."""


class BudgetStop(BaseException):
    """Carries an error out of a sync call of LiteLLM, which swallows every Exception of its callbacks and sends the call.

    The functions of `litellm` raise `error` in its place. Whoever took a function out of the module before the guard was
    made, as by `from litellm import completion`, meets this class itself.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"{error} (raised as BudgetStop because this function was imported before the guard was made: "
            "call litellm.completion and the like, or make the guard first.)"
        )
        self.error = error


def litellm_error(error: BaseException) -> BaseException:
    """The same error, as LiteLLM understands it: a refusal in its class, the others with a status that says whether to retry."""
    if isinstance(error, BudgetExceeded):
        if isinstance(error, LiteLLMBudgetExceeded):
            return error
        kinds = {ApprovalRequired: LiteLLMApprovalRequired, Stopped: LiteLLMStopped}
        return kinds.get(type(error), LiteLLMBudgetExceeded)(str(error), **error.fields)
    if isinstance(error, BursarError) and not hasattr(error, "status_code"):
        vars(error)["status_code"] = 503 if isinstance(error, StoreError) else 400
    return error


def check_bounded(kind: str) -> None:
    """Raise UnboundedEstimate for a kind of call whose cost does not come with its answer."""
    reason = UNBOUNDED.get(kind)
    if reason is not None:
        refusal = UnboundedEstimate(
            f"{kind} cannot be held against a budget: {reason}. Make it outside of the guarded LiteLLM, and book its cost "
            "with charge().",
            reason=reason,
            provider="",
            model="",
        )
        raise litellm_error(refusal)
