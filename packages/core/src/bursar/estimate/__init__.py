"""Estimates: what a call may use, as an upper bound (`strict`) or as learned from settled calls (`Learner`)."""

from bursar.estimate.learned import Learner
from bursar.estimate.request import Request
from bursar.estimate.strict import Estimate, strict

__all__ = ["Estimate", "Learner", "Request", "strict"]
