"""Texts from outside, as every store, log and screen can hold them."""

from __future__ import annotations

MAX_LENGTH = 1_000


def printable(text: str, most: int = MAX_LENGTH) -> str:
    """The text's beginning, with `?` for every sign that cannot be printed.

    Those are control characters, which a terminal obeys and PostgreSQL does not take; lone surrogates, which no UTF-8 holds;
    and signs that turn the direction of writing.
    """
    text = text[:most]
    return text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)
