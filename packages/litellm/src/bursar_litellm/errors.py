"""The refusal as LiteLLM meets it: no retry of the Router takes it up, and the proxy answers it with 402."""

from __future__ import annotations

from typing import Any

from bursar.errors import ApprovalRequired, BudgetExceeded, BursarError, Stopped, StoreError


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
