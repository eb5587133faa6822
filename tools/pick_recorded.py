"""Pick the recordings that are packaged with `bursar.testing.provider` from a corpus of recorded traffic.

Usage: python tools/pick_recorded.py CORPUS_FOLDER, where responses.jsonl.gz and runs.jsonl.gz stand.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "packages/core/src/bursar/testing/provider/recorded"
RUNS = {
    "langchain-agent": "run-40f228f1b872",  # LangChain, gpt-3.5-turbo, streamed without usage, a failing tool
    "mcp-agent": "run-84b753f38b2d",  # gpt-4o, plain bodies with usage, a tool retried
    "weather-agent": "run-00df6de10f9a",  # gpt-4o, streamed with usage, parallel tool calls
}
SAMPLES = {
    "anthropic-messages": "x10d80d521d9d5c",
    "anthropic-stream": "x94267e1e37abb5",
    "gemini": "x497d32d5425e94",
    "gemini-stream": "x07211cf28d1d19",
    "openai-responses": "x613f98d92b14b7",
    "openai-responses-stream": "x131b3d45d3a671",
    "openai-embeddings": "x7e334c9911e7a5",
}
LICENCES = {"pydantic/pydantic-ai": "MIT"}  # the corpus' other recordings are Apache-2.0


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def step(row: dict[str, Any]) -> dict[str, Any]:
    """One exchange in the form that Recorded.from_dict reads."""
    answer = row["response"]
    if row.get("stream"):
        if not answer["complete"]:
            raise SystemExit(f"{row['id']} is not whole: pick another.")
        response = {"status": row["status"], "events": answer["events"]}
    else:
        response = {"status": row["status"], "body": answer}
    if "body" not in row["request"] or "response_trimmed" in row:
        raise SystemExit(f"{row['id']} is not whole: pick another.")
    return {"endpoint": row["endpoint"], "request": row["request"]["body"], "response": response}


def write(name: str, exchanges: list[dict[str, Any]]) -> None:
    """Write one recording with where it comes from."""
    source = exchanges[0]["source"]
    repository = source.partition(":")[0]
    content = {
        "source": sorted({row["source"] for row in exchanges}),
        "licence": LICENCES.get(repository, "Apache-2.0"),
        "model": exchanges[0]["model"],
        "steps": [step(row) for row in exchanges],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace('{"endpoint"', '\n{"endpoint"')
    (TARGET / f"{name}.json").write_text(text + "\n", "utf-8")
    print(f"{name}: {len(exchanges)} exchanges, {len(text)} characters, {source}")


def main(folder: Path) -> None:
    """Pick all."""
    chosen = set(SAMPLES.values())
    runs = {row["run_id"]: row for row in rows(folder / "runs.jsonl.gz") if row["run_id"] in RUNS.values()}
    chosen.update(part["id"] for run in runs.values() for part in run["steps"])
    found = {row["id"]: row for row in rows(folder / "responses.jsonl.gz") if row["id"] in chosen}
    for name, run_id in RUNS.items():
        write(name, [found[part["id"]] for part in runs[run_id]["steps"]])
    for name, id in SAMPLES.items():
        write(name, [found[id]])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
