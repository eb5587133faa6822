"""A provider to run against: real HTTP on loopback, scripted or recorded answers, faults, and its own account.

from openai import OpenAI
from bursar.testing.provider import Answer, Fault, Provider

with Provider(Answer(input_tokens=1_000, output_tokens=500)) as provider:
    provider.script([Fault("refuse", status=429, retry_after_s=0.01)])  # then the answer above, for ever
    client = OpenAI(base_url=provider.url + "/v1", api_key="any")
    answer = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hello"}])
    assert answer.usage.completion_tokens == 500
    assert provider.requests == 2 and provider.billed_calls == 1
    assert provider.billed_nanos == 7_500_000  # $0.0075
"""

from __future__ import annotations

from bursar.testing.provider.account import Served
from bursar.testing.provider.provider import Provider
from bursar.testing.provider.recorded import Recorded, recorded
from bursar.testing.provider.script import Answer, Fault, Rates

__all__ = ["Provider", "Answer", "Fault", "Rates", "Served", "Recorded", "recorded"]
