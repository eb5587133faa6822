"""Kill -9 of a client of Redis at random times: the books stay whole, and the same call, made again, ends the same."""

from __future__ import annotations

import os
import random

import pytest
from kills import NEVER
from redis_server import fresh_url
from test_kill import COST_NANOS, guarded_call, in_child, opened, total_nanos

from bursar.audit import audit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def run(kills: int, seed: int) -> None:
    url = fresh_url()
    at_random = random.Random(seed)
    acknowledged = 0
    for number in range(kills):
        id = f"call-{number:05}"
        done, _ = in_child(url, id, NEVER, delay_s=at_random.uniform(0, 0.05))
        acknowledged += done
        with opened(url) as bursar:
            assert audit(bursar.store) == []  # I2, I3, I10, from the rows alone
            kinds = [record.kind for record in bursar.records() if record.id == id]
            assert kinds == ["settlement"] or not done, "I7: an acknowledged settlement is lost"
            record = guarded_call(bursar, id)
            assert record is not None
            assert record.cost_nanos == COST_NANOS
            assert bursar.store.open_reservations() == 0
            assert audit(bursar.store) == []
    assert acknowledged < kills, "no call was killed"
    assert total_nanos(url) == kills * COST_NANOS


def test_i7_kill_at_random() -> None:
    run(20, 1)


@pytest.mark.nightly
def test_i7_kill_at_random_400_times() -> None:
    run(400, 2)
