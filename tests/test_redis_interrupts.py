"""Interrupts and cancellations on Redis: nothing stays held, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import test_stores_interrupts as interrupts
from redis_server import fresh_url

from bursar import Bursar


@interrupts.needs_fork
@pytest.mark.slow
def test_i9_a_keyboard_interrupt_leaves_nothing_held_and_nobody_stuck(tmp_path: Path) -> None:
    found = interrupts.interrupted_child(fresh_url(), tmp_path, 50, 2e-3)
    assert found == {"interrupted": 50, "held": 0, "stuck": 0, "queued": 0}


@pytest.fixture
def bursar(tmp_path: Path) -> Iterator[Bursar]:
    with interrupts.open_bursar(fresh_url(), tmp_path) as bursar:
        yield bursar


def test_i9_a_cancelled_task_leaves_nothing_held(bursar: Bursar) -> None:
    interrupts.test_i9_a_cancelled_task_leaves_nothing_held(bursar)


def test_i7_a_call_cancelled_inside_its_block_is_booked(bursar: Bursar) -> None:
    interrupts.test_i7_a_call_cancelled_inside_its_block_is_booked(bursar)


def test_an_event_loop_that_is_closed_midway_leaves_the_store_to_others(bursar: Bursar) -> None:
    interrupts.test_an_event_loop_that_is_closed_midway_leaves_the_store_to_others(bursar)
