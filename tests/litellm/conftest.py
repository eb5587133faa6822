"""What the tests of the LiteLLM adapter share: they are left out where LiteLLM is absent."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec

import pytest

from bursar import Budget, Bursar
from bursar.testing.provider import Answer, Provider

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices when it is imported

# Where LiteLLM is absent its name leads to this folder, for pytest puts `tests` on the path: a package without a file.
_found = find_spec("litellm")
if _found is None or _found.origin is None or find_spec("bursar_litellm") is None:
    collect_ignore_glob = ["test_*.py"]

Guarded = Callable[..., AbstractContextManager[Bursar]]


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Answers of $0.0075 each, where gpt-4o gives them."""
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=10)) as provider:
        yield provider


@pytest.fixture
def guarded() -> Guarded:
    """guarded(*budgets): a guard that is installed, and has ended all its calls when the block is left."""
    from bursar_litellm import BursarLogger, install

    @contextmanager
    def guard(*budgets: Budget) -> Iterator[Bursar]:
        with Bursar("memory:", budgets or [Budget("ample", "100 USD")]) as bursar:
            uninstall = install(bursar)
            try:
                yield bursar
            finally:
                uninstall()
                gc.collect()
                assert BursarLogger(bursar).drain()
                assert bursar.store.open_reservations() == 0

    return guard


@pytest.fixture
def broke(guarded: Guarded) -> Guarded:
    """broke(): a guard whose budget refuses everything."""
    return lambda: guarded(Budget("cap", "0.000001 USD"))
