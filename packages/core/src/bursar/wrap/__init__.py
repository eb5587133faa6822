"""Guarded twins of the plain clients of OpenAI, Anthropic and all whose clients are made alike; `Bursar.wrap` is the door."""

from bursar.wrap.client import wrap_client

__all__ = ["wrap_client"]
