"""Reading what a provider's answer says was used: every provider, whole answers and streams."""

from bursar.answers.read import read_usage
from bursar.answers.stream import StreamReader

__all__ = ["StreamReader", "read_usage"]
