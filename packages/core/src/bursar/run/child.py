"""In the program's process: guards each library at the moment when the program has imported it."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bursar.run.order import Order

if TYPE_CHECKING:
    from bursar.facade import Bursar

CLIENTS = ("openai", "anthropic")
_started: list[Guarding] = []


def start() -> None:
    """Begin, where `bursar run` has left its order in the environment; once per process."""
    order = Order.from_environment()
    if order is not None and not _started:
        guarding = Guarding(order)
        _started.append(guarding)
        sys.meta_path.insert(0, guarding)
        atexit.register(guarding.end)


class Guarding(MetaPathFinder):
    """Watches the program's imports.

    An adapter is the entry point `bursar.adapters`, named as the module at whose import it is installed: its
    `install(bursar)`. Beside that function may stand `guards(module)`: whether the clients that this module of the framework
    makes are guarded by the adapter. Without it all clients of the framework's family are.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._bursar: Bursar | None = None
        self._guards: list[Callable[[str], bool]] = []
        self._watched: dict[str, Callable[[ModuleType], None]] = dict.fromkeys(CLIENTS, self._guard_clients)
        for adapter in entry_points(group="bursar.adapters"):
            self._watched[adapter.name] = self._installer(adapter)

    @property
    def bursar(self) -> Bursar:
        """The guard; it opens when there is something to guard."""
        if self._bursar is None:
            from bursar.budget import Budget
            from bursar.facade import Bursar

            order = self._order
            tags = {"bursar_run": order.run}
            if order.policy is not None:
                # BURSAR_STORE in the environment names the order's store
                self._bursar = Bursar.from_policy(order.policy, tags=tags)
            else:
                budgets = [] if order.budget is None else [Budget(f"run {order.run}", order.budget)]
                self._bursar = Bursar(order.store, budgets, tags=tags)
        return self._bursar

    def end(self) -> None:
        if self._bursar is not None:
            self._bursar.close()

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Leave the finding to the others, and be there whenever the module has run. A guard that fails fails the import.

        A module that was looked for may not be imported then, and one whose import failed may be imported again.
        """
        guard = self._watched.get(fullname)
        if guard is None:
            return None
        others = (getattr(finder, "find_spec", None) for finder in sys.meta_path if finder is not self)
        found = (find(fullname, path, target) for find in others if find is not None)
        spec: ModuleSpec | None = next((one for one in found if one is not None), None)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            guard(module)

        loader.exec_module = exec_module
        return spec

    def _installer(self, adapter: EntryPoint) -> Callable[[ModuleType], None]:
        def install(module: ModuleType) -> None:
            made = adapter.load()
            made(self.bursar)
            family = adapter.name.partition(".")[0].removesuffix("_core")
            own = getattr(sys.modules[made.__module__], "guards", None)
            self._guards.append(own or (lambda caller: caller.startswith(family)))
            self._order.guarded(family)

        return install

    def _guard_clients(self, module: ModuleType) -> None:
        from bursar.wrap.construct import guard_new_clients

        guard_new_clients(self.bursar, module, lambda caller: any(guards(caller) for guards in self._guards))
        self._order.guarded(module.__name__)
