"""The simulator: seeded worlds in which the real guard, law, stores and leases meet faults, and are audited."""
