"""The public names as a typed user meets them; mypy reads this file, nothing runs it."""

from __future__ import annotations

from typing import assert_type

from bursar.errors import BudgetExceeded, BursarError
from bursar.usage import Usage


def counts_are_integers(usage: Usage) -> None:
    assert_type(usage.input_tokens, int)
    assert_type(Usage(input_tokens=1_000, output_tokens=420), Usage)
    Usage(input_tokens="1000")  # type: ignore[arg-type]
    usage.input_tokens = 5  # type: ignore[misc]


def errors_have_one_root_and_typed_fields(error: BudgetExceeded) -> None:
    root: BursarError = error
    assert_type(error.budget, str)
    assert_type(error.retry_after, float | None)
    assert_type(root.fields["budget"], object)  # type: ignore[assert-type]
