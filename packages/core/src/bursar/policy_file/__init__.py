"""Policy files: TOML or YAML from outside, checked as a whole, taken as a whole, and taken again when they change."""

from __future__ import annotations

from bursar.policy_file.file import PolicyFile
from bursar.policy_file.read import read_policy
from bursar.policy_file.watch import PolicyWatch

__all__ = ["PolicyFile", "PolicyWatch", "read_policy"]
