"""What tests of budgets need: a clock to set, the contracts of stores and adapters, and a provider to run against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bursar.testing.adapter_contract import AdapterContract
    from bursar.testing.clock import ManualClock
    from bursar.testing.store_contract import StoreContract

__all__ = ["AdapterContract", "ManualClock", "StoreContract"]

# pytest loads with a contract alone, so that a clock can be had without it
_HOMES = {"AdapterContract": "adapter_contract", "ManualClock": "clock", "StoreContract": "store_contract"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bursar.testing' has no attribute {name!r}")
    if home.endswith("_contract"):
        import pytest

        pytest.register_assert_rewrite(f"bursar.testing.{home}")  # so that a failing one shows its values
    value = globals()[name] = getattr(import_module(f"bursar.testing.{home}"), name)
    return value
