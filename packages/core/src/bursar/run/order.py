"""What `bursar run` tells the program's process: which policy holds, and where to say what was guarded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "BURSAR_RUN"


@dataclass(frozen=True)
class Order:
    """One run: its id, the store, the policy file or the one budget, and the file in which each process says what it guards."""

    run: str
    store: str
    policy: str | None
    budget: str | None
    report: str

    def to_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Order | None:
        text = os.environ.get(VARIABLE)
        return None if text is None else cls(**json.loads(text))

    def guarded(self, name: str) -> None:
        """Say that a library is guarded in this process."""
        with Path(self.report).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")

    def all_guarded(self) -> Iterator[str]:
        """The libraries that were guarded, each once."""
        path = Path(self.report)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        yield from dict.fromkeys(lines)
