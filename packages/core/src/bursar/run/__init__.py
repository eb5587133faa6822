"""`bursar run`: guards a program that says nothing of budgets, by what it imports."""

from __future__ import annotations
