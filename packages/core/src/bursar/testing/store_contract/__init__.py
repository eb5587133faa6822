"""The contract of stores: what every store must do, as a pytest class that its tests derive from."""

from __future__ import annotations

from bursar.testing.store_contract.amounts import Amounts
from bursar.testing.store_contract.hostile import Hostile
from bursar.testing.store_contract.leases import Leases
from bursar.testing.store_contract.times import Times
from bursar.testing.store_contract.together import Together

__all__ = ["StoreContract"]


class StoreContract(Amounts, Hostile, Leases, Times, Together):
    """Derive a test class and give it the fixture `open_store`: a function from a clock to a store.

    Called again within one test, `open_store` must open the same data again where `durable` is true. Nearly every test
    runs through `execute` and through `aexecute`. The names in the tests (I1 ... I9) are the invariants of the design.

        class TestMine(StoreContract):
            @pytest.fixture
            def open_store(self, tmp_path):
                return lambda clock: MyStore(tmp_path / "mine", clock=clock)
    """
