"""Chaos: the provider's own account is the ledger, whatever crashes, is cut, stalls, fills up, or is killed. See chaos/run.py."""

from __future__ import annotations

import pytest
from chaos.run import Chaos

MIXED = [
    ("sqlite", False),
    ("postgres", True),
    ("redis", True),
]  # every other process takes leases, where there are any
DIRECT = [("postgres", False), ("redis", False)]


def chaos(kind: str, leased: bool, minutes: float, calls: int, every_s: tuple[float, float]) -> None:
    run = Chaos(kind, leased=leased, minutes=minutes, calls=calls, seed=1, ttl_s=max(2.0, every_s[0]), every_s=every_s)
    found = run.run()
    assert not found.wrong
    assert run.faults["processes killed"]
    assert kind == "sqlite" or run.faults["servers restarted"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "leased"), [*MIXED[:2], pytest.param(*MIXED[2], marks=pytest.mark.nightly)])
def test_some_seconds(kind: str, leased: bool) -> None:
    chaos(kind, leased, 0.1, 1_000, (0.5, 2.0))


@pytest.mark.nightly
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize(("kind", "leased"), MIXED + DIRECT)
def test_twelve_minutes(kind: str, leased: bool) -> None:
    """Together an hour, and more than 100,000 calls."""
    chaos(kind, leased, 12, 24_000, (2.0, 10.0))
