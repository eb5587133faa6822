"""Prices: a dated price book, exact to the nano-dollar, that refuses what it does not know."""

from __future__ import annotations

from bursar.prices.book import PriceBook
from bursar.prices.hosts import provider_of_url
from bursar.prices.model import ModelPrice, Price
from bursar.prices.override import Override

__all__ = ["PriceBook", "ModelPrice", "Price", "Override", "provider_of_url"]
