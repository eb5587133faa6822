"""The refusal as LiteLLM meets it: no retry of the Router takes it up, and the proxy answers it with 402."""

from __future__ import annotations

from bursar.errors import BudgetExceeded


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

    @property
    def message(self) -> str:
        """The text of the error, under the name that LiteLLM's errors have for it."""
        return str(self)


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
    """The same error; a refusal in the class that LiteLLM understands."""
    if isinstance(error, BudgetExceeded) and not isinstance(error, LiteLLMBudgetExceeded):
        return LiteLLMBudgetExceeded(str(error), **error.fields)
    return error
