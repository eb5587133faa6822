"""Which texts are the same but for small edits: every text gets the number of the first one that it is like."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import NamedTuple

MOST_COMPARED = 8
ENDS = 128  # characters kept from each end of a text
_NUMBERS = re.compile(r"\w*\d[\w-]*")


class Kinds:
    """Numbers texts by likeness, with bounded memory.

    Two texts of the same name are alike when they are equal but for numbers and ids (words with a digit in them), if
    `with_numbers` says so, or when they share `share_percent` of their pairs of neighbouring characters: an edit of one
    character changes two pairs, so 65 % admits edits of some 15 % of all characters (Ukkonen, 1992, on q-grams as a bound
    of the edit distance). Compared are the first and the last 128 characters, of texts of about the same length, with the
    first and the newest text of each kind: edits that start anew each time are found, and such that add up.
    """

    __slots__ = ("_exact", "_kinds", "_most", "_next", "_percent", "_with_numbers")

    def __init__(self, share_percent: int, most: int, *, with_numbers: bool) -> None:
        self._most = most  # kinds that are kept, and half as many again of their very texts
        self._percent = share_percent
        self._with_numbers = with_numbers
        self._exact: dict[int, int] = {}
        self._kinds: dict[int, _Kind] = {}  # newest last
        self._next = 1

    def of(self, name: Hashable, text: str) -> int:
        """The number of the kind that the text belongs to; a new one where it is like none that is kept."""
        key = hash((name, text))
        number = self._exact.pop(key, None)
        kind = self._kinds.pop(number, None) if number is not None else None
        if number is not None and kind is not None:
            self._exact[key] = number
            self._kinds[number] = kind
            return number
        seen = text if len(text) <= 2 * ENDS else text[:ENDS] + text[-ENDS:]
        bare = hash(_NUMBERS.sub("0", seen)) if self._with_numbers else 0
        number = self._likest(name, len(text), seen, bare)
        if number is None:
            number, first = self._next, seen
            self._next += 1
        else:
            first = self._kinds.pop(number).first
        self._kinds[number] = _Kind(name, len(text), bare, first, seen)
        self._exact[key] = number
        if len(self._kinds) > self._most:
            del self._kinds[next(iter(self._kinds))]
        if 2 * len(self._exact) > 3 * self._most:
            del self._exact[next(iter(self._exact))]
        return number

    def _likest(self, name: Hashable, length: int, text: str, bare: int) -> int | None:
        """The kind that the text is most like, of those that it is like enough."""
        best, best_number = self._percent, None
        pairs: set[int] | None = None
        compared = 0
        for number in reversed(self._kinds):
            kind = self._kinds[number]
            if kind.name != name:
                continue
            if bare and bare == kind.bare:
                return number
            if abs(length - kind.length) * 5 > max(length, kind.length) + 5:
                continue
            compared += 1
            if compared > MOST_COMPARED:
                break
            pairs = pairs or _pairs(text)
            share = _shared_percent(pairs, _pairs(kind.first))
            if kind.newest is not kind.first:
                share = max(share, _shared_percent(pairs, _pairs(kind.newest)))
            if share >= best:
                best, best_number = share + 1, number
        return best_number


class _Kind(NamedTuple):
    """What is kept of a kind: of its newest text the length and the hash without numbers, its first and newest text."""

    name: Hashable
    length: int
    bare: int
    first: str
    newest: str


def _shared_percent(one: set[int], other: set[int]) -> int:
    return 200 * len(one & other) // (len(one) + len(other) or 1)


def _pairs(text: str) -> set[int]:
    """The pairs of neighbouring bytes in a text, as 16-bit numbers; made in C, since this is the dearest part of a look."""
    data = text.encode("utf-8", "surrogatepass")
    view = memoryview(data)
    even, odd = len(data) // 2 * 2, (len(data) - 1) // 2 * 2
    pairs = set(view[:even].cast("H")) if even else set()
    if odd > 0:
        pairs.update(view[1 : 1 + odd].cast("H"))
    return pairs
