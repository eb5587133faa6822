"""The house holds: arrows between modules, one version, typed wheels, a sentence atop each file, no index named."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "packages/core/src/bursar"
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
SOURCES = {name: next(iter((ROOT / "packages" / name / "src").glob("bursar*"))) for name in PROJECTS}
# Frameworks that cannot share an environment are each looked at in their own.
INSTALLED = [name for name, folder in SOURCES.items() if find_spec(folder.name) is not None]

# What a module of the core may import of the core. Those not named stand on top: they may import everything, and
# nothing that is named may import them.
_BASE = {"errors", "money", "texts", "usage"}
_LAW = {"windows", "accounts", "commands", "law"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "texts": set(),
    "files": set(),
    "money": {"errors"},
    "usage": {
        "errors",
        "money",
        "answers",
    },  # Usage.from_response is the door to the readers; it loads them when called
    "answers": _BASE,
    "detect": {"errors", "estimate", "texts"},
    "estimate": _BASE,
    "prices": _BASE,
    "clock": {"errors"},
    "scope": {"errors"},
    "sending": set(),
    "waiting": {"errors"},
    "windows": {"errors"},
    "accounts": {"errors", "money", "windows"},
    "commands": {"errors", "money", "usage", "accounts"},
    "signing": {"errors", "commands"},
    "law": _BASE | _LAW | {"signing"},
    "outcome": {"errors"},
    "records": _BASE | _LAW,
    "schema": _BASE,
    "migrations": _BASE | {"schema"},
    "stores": _BASE | _LAW | {"files", "signing", "clock", "records", "schema", "migrations"},
    "budget": {"errors", "money", "windows", "accounts"},
    "decisions": {"commands", "errors", "signing", "windows"},
    "policy": _BASE | _LAW | {"budget", "decisions", "prices", "scope"},
    "call": _BASE | _LAW | {"estimate", "prices", "scope", "waiting", "policy"},
    "refusal": _BASE | _LAW | {"budget", "decisions", "policy", "records", "sentry"},
    "sentry": _BASE | _LAW | {"call", "detect", "policy", "scope"},
    "amounts": _BASE | _LAW | {"call", "estimate", "prices", "policy"},
    "ladder": _BASE | _LAW | {"budget", "call", "prices", "policy"},
    "queueing": _BASE | _LAW | {"call", "policy", "refusal", "waiting"},
    "notices": _BASE | _LAW | {"budget", "call", "policy", "refusal", "sentry", "signing", "waiting"},
    "booking": _BASE
    | _LAW
    | {"call", "amounts", "notices", "queueing", "refusal", "sentry"}
    | {"estimate", "prices", "waiting", "records", "policy"},
    "guard": _BASE | _LAW | {"booking", "call", "ladder", "prices", "queueing", "refusal", "policy", "waiting"},
    "retention": _BASE | _LAW | {"stores"},
    "audit": _BASE | _LAW | {"retention", "signing", "stores"},
    "seal": _BASE | _LAW | {"stores"},
    "trust": _BASE | _LAW | {"signing", "stores"},
    "operator": _BASE | _LAW | {"budget", "decisions", "records", "refusal", "retention", "scope", "signing", "stores"},
    "keeper": _BASE | _LAW | {"call", "guard", "stores"},
    "driver": _BASE | _LAW | {"call", "guard", "keeper", "stores", "waiting"},
    "reservation": _BASE | _LAW | {"call", "guard", "keeper", "driver", "ending", "outcome", "records"},
    "settings": _BASE | {"budget", "detect", "policy", "prices", "scope", "sentry", "alerts"},
    "making": _BASE | _LAW | {"answers", "call", "estimate", "guard", "reservation", "scope", "stores"},
    "policy_file": _BASE
    | _LAW
    | {"budget", "detect", "files", "policy", "prices", "settings", "alerts", "records", "signing", "stores"},
    "foresight": _BASE
    | _LAW
    | {
        "amounts",
        "budget",
        "call",
        "detect",
        "estimate",
        "facade",
        "ladder",
        "policy",
        "policy_file",
        "prices",
        "queueing",
        "scope",
    }
    | {"stores", "testing"},
}
# What other packages may rely on: the names of `bursar` itself and of these modules.
PUBLIC = {"errors", "testing", "schema", "money", "usage", "prices", "cli", "sending", "ending"}
# SQLModel is the tables' face, SQLAlchemy the engine below it; pydantic_core is pydantic's: the one always brings the other.
BROUGHT_ALONG = {
    "sqlmodel": {"sqlalchemy"},
    "pydantic": {"pydantic_core"},
    "llama-index-core": {"llama_index_instrumentation", "pydantic"},  # its base classes are theirs
}
# Modules that nobody has to install: they are loaded only to read an object of their own, so they are there.
MET = {"core": {"google.protobuf"}}


def imports(source: str, package: str) -> Iterator[str]:
    """Every module that the source imports, late and type-only imports included, `from a import b` as `a.b`.

    `package` is the one that the source lies in, where relative imports start.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def wrong_arrows(source: str, room: str, package: str) -> list[str]:
    """The rooms of the core that a source of `room` imports without an arrow."""
    rooms = {name.split(".")[1] for name in imports(source, package) if name.startswith("bursar.")}
    return sorted(name for name in rooms & core_rooms() - {room} if name not in ARROWS[room])


def private_imports(source: str, package: str) -> list[str]:
    """What a package above the core imports of it that is not public."""
    found = []
    for name in imports(source, package):
        parts = name.split(".")
        if parts[0] != "bursar" or len(parts) == 1:
            continue
        inner = parts[1] in core_rooms() and parts[1] not in PUBLIC
        if inner or any(part.startswith("_") for part in parts):
            found.append(name)
    return found


def undeclared(source: str, package: str, allowed: set[str]) -> list[str]:
    """The third-party modules that a source imports without its package asking for them."""
    known = tuple(f"{name}." for name in allowed | sys.stdlib_module_names)
    return sorted({name for name in imports(source, package) if not f"{name}.".startswith(known)})


@cache
def core_rooms() -> frozenset[str]:
    return frozenset(path.stem for path in CORE.iterdir() if path.suffix == ".py" or any(path.glob("*.py")))


@cache
def tracked(suffix: str = "") -> list[Path]:
    """The files of the repository: what git knows or would take."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name.endswith(suffix) and (ROOT / name).is_file()]


def modules(folder: Path) -> list[Path]:
    return [path for path in tracked(".py") if folder in path.parents]


def package_of(path: Path, folder: Path) -> str:
    return ".".join(path.parent.relative_to(folder.parent).parts)


def test_arrows_of_the_core_point_down() -> None:
    wrong = {}
    for path in modules(CORE):
        room = path.relative_to(CORE).parts[0].removesuffix(".py")
        if room in ARROWS and (found := wrong_arrows(path.read_text(), room, package_of(path, CORE))):
            wrong[path.relative_to(CORE).as_posix()] = found
    assert not wrong, f"these import what stands above or beside them: {wrong}"


@pytest.mark.parametrize(
    ("planted", "package"),
    [
        ("from bursar.law import decide", "bursar"),
        ("import bursar.law", "bursar"),
        ("from bursar import law", "bursar"),
        ("from .law import decide", "bursar"),
        ("from ..law import decide", "bursar.money"),
        ("def late():\n    from . import law", "bursar"),
        ("if TYPE_CHECKING:\n    import bursar.law as law", "bursar"),
    ],
)
def test_a_planted_arrow_upwards_is_found(planted: str, package: str) -> None:
    assert wrong_arrows(planted, "money", package) == ["law"]
    assert wrong_arrows("from bursar.errors import BursarError\nimport law", "money", package) == []


def test_the_packages_above_import_only_public_names() -> None:
    wrong = {}
    for name, folder in SOURCES.items():
        for path in modules(folder) if name != "core" else []:
            if found := private_imports(path.read_text(), package_of(path, folder)):
                wrong[path.name] = found
    assert not wrong, f"these reach into the core: {wrong}"


def test_a_planted_reach_into_the_core_is_found() -> None:
    for planted in ("from bursar.law import decide", "from bursar import law", "from bursar.errors import _rebuild"):
        assert private_imports(planted, "bursar_langchain"), planted
    assert private_imports("from bursar import Bursar\nfrom bursar.errors import BursarError", "bursar_langchain") == []


@pytest.mark.parametrize("name", INSTALLED)
def test_a_package_imports_only_what_it_asks_for(name: str) -> None:
    """So the core imports no framework, and no package leans on what another happens to bring along."""
    project = PROJECTS[name]["project"]
    wanted = [
        *project["dependencies"],
        *(one for extra in project.get("optional-dependencies", {}).values() for one in extra),
    ]
    asked = {re.split(r"[\s<>=!~;\[]", one, maxsplit=1)[0].lower() for one in wanted}
    allowed = {
        module for module, owners in metadata.packages_distributions().items() if asked & {o.lower() for o in owners}
    }
    ours = {folder.name for other, folder in SOURCES.items() if PROJECTS[other]["project"]["name"] in asked}
    allowed |= ours | {SOURCES[name].name} | MET.get(name, set())
    allowed |= {extra for one in asked for extra in BROUGHT_ALONG.get(one, ())}
    allowed |= {one.replace("-", "_") for one in asked}  # what an extra asks for need not be installed here
    folder = SOURCES[name]
    wrong = {
        path.relative_to(folder).as_posix(): found
        for path in modules(folder)
        if (found := undeclared(path.read_text(), package_of(path, folder), allowed))
    }
    assert not wrong, f"imported, but not in the requirements of packages/{name}: {wrong}"
    assert undeclared("import langchain_core", "bursar", {"click"}) == ["langchain_core"]


def dangers(source: str) -> list[str]:
    """What runs text as code, makes objects of data, or trusts whoever answers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [name for name in imports(ast.unparse(node), "") if name.partition(".")[0] in _UNSAFE_MODULES]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {f"{one.arg}={ast.unparse(one.value)}" for one in node.keywords}
            found += [called] if called in _UNSAFE_CALLS else sorted(keywords & _UNSAFE_KEYWORDS)
    return found


_UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle"}
_UNSAFE_CALLS = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load"),
    *("yaml.full_load", "yaml.load_all", "ssl._create_unverified_context"),
}
_UNSAFE_KEYWORDS = {"shell=True", "verify=False", "check_hostname=False", "verify_mode=ssl.CERT_NONE"}


def test_nothing_runs_text_or_trusts_whoever_answers() -> None:
    wrong = {
        path.relative_to(ROOT).as_posix(): found
        for folder in SOURCES.values()
        for path in modules(folder)
        if (found := dangers(path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize(
    "planted",
    [
        "eval(text)",
        "def late():\n    exec(text)",
        "import pickle",
        "from pickle import loads",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(words, shell=True)",
        "httpx.Client(verify=False)",
        "os.system(words)",
    ],
)
def test_a_planted_danger_is_found(planted: str) -> None:
    assert dangers(planted)
    assert dangers("re.compile(x)\nloader.exec_module(x)\nsubprocess.run(words)\nyaml.safe_load(x)") == []


def test_import_bursar_is_light() -> None:
    """`import bursar` takes under 100 ms; with its everyday names it loads neither asyncio, pydantic nor SQLAlchemy."""
    code = """
import json, sys, time
start = time.perf_counter()
import bursar
took_s = time.perf_counter() - start
everyday = {"Bursar", "Budget", "Usage", "BudgetExceeded", "BursarError"} & set(getattr(bursar, "__all__", ()))
for name in everyday:
    getattr(bursar, name)
print(json.dumps([took_s, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(5)  # the fastest of five: other tests run beside this one
    ]
    heavy = {"asyncio", "pydantic", "sqlalchemy", "sqlmodel", "alembic", "click", "rich", "yaml"}
    assert not heavy & set(runs[0][1])
    assert min(took_s for took_s, _ in runs) < 0.1


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes
    assert changes[1] == version
    for name, data in PROJECTS.items():
        project = data["project"]
        assert project["version"] == version, name
        assert name not in INSTALLED or metadata.version(project["name"]) == version, name
        ours = [one for one in project["dependencies"] if one.startswith("bursar")]
        assert all(one.endswith(f"=={version}") for one in ours), ours
        assert name == "core" or ours, f"{name} has to ask for bursar=={version}"


@pytest.mark.skipif("NOX_CURRENT_SESSION" not in os.environ, reason="run by hand, on whatever is installed")
def test_the_built_wheels_are_what_is_tested() -> None:
    assert "core" in INSTALLED
    for folder in (SOURCES[name] for name in INSTALLED):
        assert ROOT / "packages" not in Path(str(resources.files(folder.name))).parents


@pytest.mark.parametrize("name", INSTALLED)
def test_the_installed_package_holds_every_file_and_its_type_marker(name: str) -> None:
    """A file that the wheel forgets (data, templates, py.typed) is missing for users only, so the wheel is compared."""
    folder = SOURCES[name]
    installed = Path(str(resources.files(folder.name)))
    missing = [
        path.relative_to(folder).as_posix()
        for path in tracked()
        if folder in path.parents and not (installed / path.relative_to(folder)).is_file()
    ]
    assert not missing
    assert (installed / "py.typed").is_file()


@pytest.mark.parametrize("name", PROJECTS)
def test_each_wheel_carries_the_licence(name: str) -> None:
    assert (ROOT / "packages" / name / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_one_sentence_at_the_top_of_each_file() -> None:
    missing = []
    for path in tracked(".py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = text.split("\n\n")[0].rstrip()
        if not first.endswith((".", "!", "?", ":")):
            missing.append(path.relative_to(ROOT).as_posix())
    assert not missing, f"no sentence says what lives in: {missing}"


def test_pins_are_exact_hashed_and_name_no_address() -> None:
    files = [path for path in tracked(".txt") if path.name.startswith("pins")]
    assert {path.name for path in files} >= {"pins.txt"}
    for path in files:
        text = path.read_text()
        entries = re.findall(r"^[a-z0-9].*(?:\n    .*)*", text, re.MULTILINE)
        assert entries
        assert all(re.match(r"\S+==\S+", entry) and "--hash=sha256:" in entry for entry in entries), path
        assert "://" not in text, path


def test_no_tracked_file_names_a_package_index() -> None:
    """Whoever installs chooses the index, so no file may choose one."""
    hosts = [
        ".".join(parts) for parts in (("pypi", "org"), ("files", "pythonhosted", "org"), ("registry", "npmjs", "org"))
    ]
    found = [
        path.relative_to(ROOT).as_posix() for path in tracked() if any(h.encode() in path.read_bytes() for h in hosts)
    ]
    assert not found
