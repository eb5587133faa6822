"""The command line: `bursar`. Commands of other packages join through the entry point group `bursar.commands`."""

from __future__ import annotations

from bursar.cli.main import main

__all__ = ["main"]
