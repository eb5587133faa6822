"""Bursar: in-process budgets for AI agents."""
