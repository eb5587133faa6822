"""Python runs this file at its start, because `bursar run` put its folder on PYTHONPATH: the guard begins here."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from bursar.run.child import start

start()

# A sitecustomize of the environment's own, which this one stands in front of, has its turn.
_here = Path(__file__).resolve().parent
_rest = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
_spec = PathFinder.find_spec("sitecustomize", _rest)
if _spec is not None and _spec.loader is not None and _spec.origin != __file__:
    _spec.loader.exec_module(sys.modules[__name__])
