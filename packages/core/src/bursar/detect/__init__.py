"""Detectors of runaway spend: loops, retries and velocity, from what a run asks for; pure, and in constant memory."""

from bursar.detect.retries import Storm
from bursar.detect.run import RunWatch
from bursar.detect.settings import CAUSES, Detectors, Finding
from bursar.detect.tower import Watchtower
from bursar.detect.velocity import Velocity

__all__ = ["CAUSES", "Detectors", "Finding", "RunWatch", "Storm", "Velocity", "Watchtower"]
