"""The promise on Redis, on one server and in a cluster: ten calls fit the cap, whatever threads, processes and kills do."""

from __future__ import annotations

import pytest
import test_scenarios as scenarios
from redis_server import fresh_cluster_url, fresh_url

from bursar.testing.provider import Provider

provider = scenarios.provider


@pytest.fixture(params=["server", "cluster"])
def url(request: pytest.FixtureRequest) -> str:
    return fresh_url() if request.param == "server" else f"{fresh_cluster_url()}?org=acme"


@pytest.mark.parametrize("mode", ["given", "warm", "cold, waiting"])
def test_fifty_threads(url: str, provider: Provider, mode: str) -> None:
    scenarios.test_fifty_threads(url, provider, mode)


@pytest.mark.parametrize("mode", ["given", "cold, waiting"])
def test_fifty_tasks(url: str, provider: Provider, mode: str) -> None:
    scenarios.test_fifty_tasks(url, provider, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["given", pytest.param("cold, waiting", marks=pytest.mark.nightly)])
def test_four_processes_of_thirteen_threads(url: str, provider: Provider, mode: str) -> None:
    scenarios.four_processes(url, provider, mode)


def test_a_killed_process_with_five_calls_in_flight(url: str, provider: Provider) -> None:
    scenarios.killed_with_five_in_flight(url, provider)


def test_a_parents_budget_holds_for_five_children(url: str, provider: Provider) -> None:
    scenarios.test_a_parents_budget_holds_for_five_children(url, provider, "given")
