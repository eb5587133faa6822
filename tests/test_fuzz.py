"""Whatever comes from outside is read, or is a BursarError: Hypothesis makes the inputs, `tools/fuzz.py` makes more."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from fuzz_targets import TARGETS, vocabulary
from hypothesis import given
from hypothesis import strategies as st

_NUMBERS = st.integers(-3, 2**70) | st.floats() | st.sampled_from([0, 1, 2**48, 2**63, -1, 10**400, 1e308])
_MARKS = ["", "\n", "\r", "\t", "\0", "\x1b[2J", "\u2028", "\u202e", "\ud800", "=1+1", "[DONE]", "data: ", "event: x\n"]
_PIECES = [
    "9" * 400,
    "1e999999999",
    "1e-999999999",
    "nan",
    "inf",
    "-1",
    "٣",
    "1/0",
    "USD",
    "5 USD",
    "%",
    "day",
    "://",
    ":",
    "@",
]


def texts(words: Sequence[str]) -> st.SearchStrategy[str]:
    """Texts that hold the words which a reader knows, and what breaks readers."""
    return st.lists(st.sampled_from([*_MARKS, *_PIECES, *words]) | st.text(max_size=8), max_size=12).map("".join)


def documents(words: Sequence[str]) -> st.SearchStrategy[str]:
    """JSON with the keys which a reader knows; NaN, Infinity and integers of hundreds of digits included."""
    known = st.sampled_from(words or ["id"])
    leaves = st.none() | st.booleans() | _NUMBERS | known | st.sampled_from([*_MARKS, *_PIECES])
    inner = lambda one: st.lists(one, max_size=4) | st.dictionaries(known | st.text(max_size=4), one, max_size=5)  # noqa: E731
    found = st.dictionaries(known, st.recursive(leaves, inner, max_leaves=20), max_size=5)
    return (found | st.lists(found, max_size=4)).map(lambda value: json.dumps(value, ensure_ascii=False))


@pytest.mark.parametrize("name", TARGETS)
def test_what_comes_from_outside_is_read_or_is_a_bursar_error(name: str) -> None:
    target = TARGETS[name]
    words = vocabulary(target)

    @given(st.tuples(st.binary(max_size=1), texts(words) | documents(words)) | st.binary(max_size=200))
    def holds(made: tuple[bytes, str] | bytes) -> None:
        if isinstance(made, tuple):
            made = (made[0] if name == "answer" else b"") + made[1].encode("utf-8", "surrogatepass")
        target(made)

    holds()
