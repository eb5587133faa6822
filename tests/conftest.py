"""What every test shares: how many examples a property is tried with, in a change and at night."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: the machines that run this are shared, and a slow example is not a wrong one.
settings.register_profile("change", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", settings.get_profile("change"), max_examples=5_000)
settings.load_profile("change")

# Where the environment is known, a test of a module that it ought to have fails without it, and is not left out unseen.
_LACKS = os.environ.get("BURSAR_TESTS_LACK")
_importorskip = pytest.importorskip


def _import(name: str, *args: Any, **options: Any) -> Any:
    return _importorskip(name, *args, **options) if name in (_LACKS or "").split() else importlib.import_module(name)


if _LACKS is not None:
    pytest.importorskip = _import

# Every HTTP client reads all of the system's certificates when it is made, 17 ms, for providers that speak plain HTTP.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)


@pytest.fixture(scope="session", autouse=True)
def frozen() -> None:
    """What was made by imports stays: collecting garbage takes 20 ms then, and 200 ms otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def collected_between_tests() -> Iterator[None]:
    """Garbage is collected where no request is under way.

    httpcore's pool has a lock that its own thread cannot take twice: a dropped stream that the collector closes amid another
    request waits for itself for ever.
    """
    gc.disable()
    yield
    if gc.get_count()[0] > 50_000:
        gc.collect()
