"""Fuzzes the targets of `tests/fuzz_targets.py` with Atheris, led by what inputs reach: `nox -s fuzz -- SECONDS [TARGET...]`.

Each target gets its share of the seconds. The corpus grows in `fuzz/TARGET`, and is where the next run begins. Ends with 1
where an input broke a target, or held it up; that input is then in `fuzz/`, to become a regression test.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
MAX_BYTES = 4_096
SLOW_S = 10  # an input that takes longer is a finding: it would hold up the program that reads it
MAX_MEMORY_MB = 2_048

with atheris.instrument_imports(include=["bursar", "yaml", "tomllib"]):
    from fuzz_targets import TARGETS, vocabulary


def main(seconds: int, names: list[str]) -> int:
    """Fuzz each target in a process of its own: the engine ends its process at the first finding."""
    broken = []
    for name in names:
        share = max(1, seconds // len(names))
        command = [sys.executable, "-P", __file__, "--one", name, f"-max_total_time={share}"]
        if subprocess.run(command).returncode:
            broken.append(name)
    print(f"fuzz: {len(names) - len(broken)} of {len(names)} targets held{f'; broken: {broken}' if broken else ''}.")
    return 1 if broken else 0


def one(name: str, options: list[str]) -> None:
    """Fuzz one target until the time is over, or an input breaks it."""
    corpus = ROOT / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds(name)):
        (corpus / f"seed-{index}").write_bytes(seed[:MAX_BYTES])
    words = corpus.with_suffix(".dict")
    known = vocabulary(TARGETS[name]) or ("USD",)
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in known))
    limits = [f"-max_len={MAX_BYTES}", f"-timeout={SLOW_S}", f"-rss_limit_mb={MAX_MEMORY_MB}"]
    places = [f"-dict={words}", f"-artifact_prefix={ROOT / 'fuzz'}/{name}-", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, *places, *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


def seeds(name: str) -> list[bytes]:
    """Inputs that are well formed: recorded answers, and the policies of the documentation."""
    if name in ("answer", "price_of"):
        with gzip.open(ROOT / "tests/data/answers/recorded.jsonl.gz") as file:
            lines = list(file)
        return (
            lines if name == "price_of" else [b"\0" + json.dumps(json.loads(one).get("body")).encode() for one in lines]
        )
    if name.startswith("policy"):
        form = {"policy_toml": "toml", "policy_yaml": "yaml"}.get(name, "")
        page = (ROOT / "docs/policy.md").read_text().split("```")
        return [block.partition("\n")[2].encode() for block in page[1::2] if block.startswith(f"{form} policy")]
    return []


def _escaped(word: str) -> str:
    return "".join(chr(byte) if 32 < byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word.encode())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 60, sys.argv[2:] or list(TARGETS)))
