"""Money: integer nano-dollars, exact rates, one rounding function."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from bursar.errors import InvalidInput, shown

NANOS_PER_USD = 1_000_000_000
MAX_LENGTH = 100  # of an amount as text: exact arithmetic on a million digits takes minutes
_EXACT = re.compile(r"[^eE]+(?:[eE][+-]?\d{1,2})?")
MAX_NANOS = 2**62  # 4.6 billion dollars: what fits every store's 64-bit integers with room for sums


def round_half_up(value: Fraction) -> int:
    """Round to the nearest integer, halves away from zero: the only rounding of money in Bursar."""
    numerator, denominator = abs(value.numerator), value.denominator
    rounded = (2 * numerator + denominator) // (2 * denominator)
    return rounded if value >= 0 else -rounded


def nanos(amount: Decimal | int | str) -> int:
    """US dollars as nano-dollars, rounded half up once. Raises InvalidInput for what is not a finite amount."""
    if isinstance(amount, float):
        raise InvalidInput(
            f'Money is never a float: got {shown(amount)}. Write it as a string, "{amount}".', value=amount
        )
    try:
        value = Decimal(amount if len(amount) <= MAX_LENGTH else "") if isinstance(amount, str) else Decimal(amount)
    except (InvalidOperation, TypeError, ValueError):
        raise InvalidInput(f'{shown(amount)} is not an amount of money. Write it like "0.50".', value=amount) from None
    if not value.is_finite() or abs(value.adjusted()) > 30 or len(value.as_tuple().digits) > MAX_LENGTH:
        raise InvalidInput(f'{shown(amount)} is not a finite amount of money. Write it like "0.50".', value=amount)
    result = round_half_up(Fraction(value) * NANOS_PER_USD)
    if abs(result) > MAX_NANOS:
        raise InvalidInput(
            f"{shown(amount)} USD is beyond what an account holds ({MAX_NANOS // NANOS_PER_USD} USD).", value=amount
        )
    return result


def fraction(text: str) -> Fraction:
    """A decimal number, or a ratio of two, exact. Raises ValueError, also for what nobody could reckon with: `1e99999999`."""
    if len(text) > MAX_LENGTH or not _EXACT.fullmatch(text):
        raise ValueError(f"{shown(text)} is no amount")
    try:
        return Fraction(text)
    except ZeroDivisionError as error:
        raise ValueError(f"{shown(text)} is no amount") from error


def dollars(amount_nanos: int) -> Decimal:
    """Nano-dollars as exact US dollars, with the decimals that `dollar_text` shows."""
    return Decimal(dollar_text(amount_nanos))


def dollar_text(amount_nanos: int) -> str:
    """Nano-dollars as a plain decimal string of dollars, at least two decimals, never an exponent: `0.0075`, `5.00`."""
    sign, rest = ("-", -amount_nanos) if amount_nanos < 0 else ("", amount_nanos)
    whole, part = divmod(rest, NANOS_PER_USD)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"
