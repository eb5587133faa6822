"""Foresight: what a policy would do, before it does it, by the real guard and law in simulated time."""

from __future__ import annotations
