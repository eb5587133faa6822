"""Bursar for LiteLLM: budgets that hold before a call is sent, in the SDK, its Router and the proxy."""

from __future__ import annotations

from bursar_litellm.errors import BudgetStop, LiteLLMBudgetExceeded
from bursar_litellm.install import install
from bursar_litellm.logger import BursarLogger

__all__ = ["BursarLogger", "install", "LiteLLMBudgetExceeded", "BudgetStop"]
