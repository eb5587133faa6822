"""Bursar for CrewAI: budgets that hold before a call is sent, for crews, flows, agents, or the whole process."""

from __future__ import annotations

from bursar_crewai.errors import CrewBudgetExceeded
from bursar_crewai.guard import BursarCrew, install

__all__ = ["BursarCrew", "install", "CrewBudgetExceeded"]
