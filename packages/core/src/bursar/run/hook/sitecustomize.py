"""Python runs this file at its start, because `bursar run` put its folder on PYTHONPATH: the guard begins here."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

try:
    from bursar.run.child import start
except ModuleNotFoundError as error:
    if error.name != "bursar":
        raise
    # a Python of another environment, which the program has started
else:
    start()

# A sitecustomize of the environment's own, which this one stands in front of, has its turn.
_here = Path(__file__).resolve().parent
_rest = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
_spec = PathFinder.find_spec("sitecustomize", _rest)
if _spec is not None and _spec.loader is not None and _spec.origin != __file__:
    _spec.loader.exec_module(sys.modules[__name__])
