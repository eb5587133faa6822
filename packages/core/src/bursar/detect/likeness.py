"""Which texts are the same but for small edits: every text gets the number of the first one that it is like."""

from __future__ import annotations

import re
from collections import OrderedDict

MOST_KINDS = 32  # kept: a round of the longest cycle, with room for the steps around it
MOST_EXACT = 64
MOST_COMPARED = 8
ENDS = 128  # characters kept from each end of a text
_NUMBERS = re.compile(r"\w*\d[\w-]*")


class Kinds:
    """Numbers texts by likeness, with bounded memory.

    Two texts of the same name are alike when they are equal but for numbers and ids (words with a digit in them), or when
    they share `share_percent` of their pairs of neighbouring characters: an edit of one character changes two pairs, so
    65 % admits edits of some 15 % of all characters, and of `edits` in a text that is shorter. Compared are the first
    and the last 128 characters, of texts of about the same length, with the first and the newest text of a kind: edits
    that start anew from the first each time are found, and such that add up.
    """

    __slots__ = ("_exact", "_kinds", "_next", "_percent", "_with_numbers")

    def __init__(self, share_percent: int, *, with_numbers: bool) -> None:
        self._percent = share_percent
        self._with_numbers = with_numbers
        self._exact: OrderedDict[int, int] = OrderedDict()
        self._kinds: OrderedDict[int, tuple[str, int, str, str]] = OrderedDict()
        self._next = 1

    def of(self, name: str, text: str) -> int:
        """The number of the kind that the text belongs to; a new one where it is like none that is kept."""
        key = hash((name, text))
        number = self._exact.get(key)
        if number is not None and number in self._kinds:
            self._exact.move_to_end(key)
            self._kinds.move_to_end(number)
            return number
        seen = text if len(text) <= 2 * ENDS else text[:ENDS] + text[-ENDS:]
        number = self._like(name, len(text), seen)
        if number is None:
            number, first = self._next, seen
            self._next += 1
        else:
            first = self._kinds[number][2]
        self._kinds[number] = (name, len(text), first, seen)
        self._kinds.move_to_end(number)
        self._exact[key] = number
        if len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)
        if len(self._exact) > MOST_EXACT:
            self._exact.popitem(last=False)
        return number

    def _like(self, name: str, length: int, text: str) -> int | None:
        compared = 0
        bare = pairs = None
        for number in reversed(self._kinds):
            other, size, first, newest = self._kinds[number]
            if other != name:
                continue
            if compared >= MOST_COMPARED:
                return None
            compared += 1
            if self._with_numbers:
                bare = bare or _NUMBERS.sub("0", text)
                if bare == _NUMBERS.sub("0", newest):
                    return number
            if abs(length - size) * 5 > max(length, size) + 5:
                continue
            pairs = pairs or _pairs(text)
            if self._alike(pairs, _pairs(first)) or (newest is not first and self._alike(pairs, _pairs(newest))):
                return number
        return None

    def _alike(self, one: set[int], other: set[int]) -> bool:
        return len(one & other) * 100 >= self._percent * max(len(one), len(other))


def _pairs(text: str) -> set[int]:
    """The pairs of neighbouring bytes in a text, as 16-bit numbers; made in C, since this is the dearest part of a look."""
    data = text.encode("utf-8", "surrogatepass")
    view = memoryview(data)
    even, odd = len(data) // 2 * 2, (len(data) - 1) // 2 * 2
    pairs = set(view[:even].cast("H")) if even else set()
    if odd > 0:
        pairs.update(view[1 : 1 + odd].cast("H"))
    return pairs
