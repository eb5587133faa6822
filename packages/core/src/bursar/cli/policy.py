"""`bursar policy`: check a policy file, and print the JSON Schema that editors use."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def command() -> None:
    """Check policy files."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check FILE, a policy in TOML or YAML; every fault is shown with its line and key."""
    from bursar.policy_file import read_policy

    policy = read_policy(file)
    budgets, prices = len(policy.budget), len(policy.price)
    click.echo(f"{file}: a valid policy with {budgets} budget(s) and {prices} price(s), store {policy.store}.")


@command.command()
def schema() -> None:
    """Print the JSON Schema of policy files."""
    from bursar.policy_file import PolicyFile

    click.echo(json.dumps(PolicyFile.model_json_schema(), indent=2))
