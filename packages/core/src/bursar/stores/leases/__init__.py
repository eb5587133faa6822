"""Leases: a process takes slices of hot accounts of a shared store, and reserves from them in memory."""

from bursar.stores.leases.recovery import Recovered, recover
from bursar.stores.leases.store import LeasedStore

__all__ = ["LeasedStore", "Recovered", "recover"]
