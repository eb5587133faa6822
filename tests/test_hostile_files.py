"""Hostile files: policies that run, blow up or hang, and files that other users of the machine can read, change or plant."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bursar import Budget, Bursar, InvalidInput, PolicyError, StoreError
from bursar.cli import main
from bursar.files import open_to_all, read_text
from bursar.policy_file import PolicyWatch, read_policy
from bursar.stores import open_store, public_url
from bursar.stores.memory import MemoryStore

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="modes, pipes, links and limits of Linux")

TOML = '[[budget]]\nname = "b"\nlimit = "1 USD"\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- policies


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch owned']",
        "!!python/object/new:subprocess.Popen [['touch', 'owned']]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:bursar.Budget {name: b}",
        "!!python/tuple [1]",
        "!include /etc/passwd",
    ],
)
def test_no_tag_of_yaml_makes_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (f"store: {tag}\n", f"budget: [{tag}]\n", tag):
        with pytest.raises(PolicyError):
            read_policy(write(tmp_path / "p.yaml", text))
    assert not (tmp_path / "owned").exists()


BOMBS = {
    "laughs.yaml": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)),
    "merge.yaml": "a: &a {x: 1}\nbudget: [{<<: *a}]\n",
    "flow.yaml": "a: " + "[" * 100_000,
    "block.yaml": "\n".join(" " * n + "a:" for n in range(900)),
    "deep.yaml": "a: " + "[" * 40 + "]" * 40,
    "digits.yaml": "default_limit: " + "9" * 900_000,
    "sixty.yaml": "default_limit: 1" + ":1" * 20_000,
    "date.yaml": "a: 0001-01-01T00:00:00+23:00",
    "set.yaml": "? [a, b]\n: 1\n",
    "key.yaml": "a" * 900_000 + ": 1",
    "twice.yaml": "budget: [{name: a, limit: 1 USD}]\nbudget: []\n",
    "inner-twice.yaml": "budget: [{name: a, limit: 1 USD, limit: 9 USD}]\n",
    "nul.yaml": "a: \0",
    "flow.toml": "a = " + "[" * 100_000,
    "dots.toml": "a" + ".a" * 400_000 + " = 1",
    "few-dots.toml": "a" + ".a" * 400 + " = 1",
    "header.toml": "[a" + ".a" * 400_000 + "]",
    "inline.toml": "x = {a" + ".a" * 400_000 + " = 1}",
    "digits.toml": "default_limit = " + "9" * 900_000,
    "string.toml": 'default_limit = "' + "9" * 900_000 + '"',
    "escape.toml": 'a = "' + "\\" * 900_001 + '"',
    "quotes.toml": "a = " + '"""' * 300_000,
    "tables.toml": "[[price]]\n" * 90_000,
    "large.toml": "#" * 1_000_001,
    "huge-price.toml": '[[price]]\nmodel = "m"\ninput_mtok = "1e99999999"\n',
    "huge-discount.toml": '[[price]]\nmodel = "m"\ndiscount = "1e99999999%"\n',
    "huge-tool.toml": '[tools]\nx = "0.' + "1" * 9_000 + '"\n',
    "password.toml": f"[[alert]]\nurl = '://{':' * 9_900}'\nlog = true\n",
    "rate.toml": '[rates]\nEUR = "' + "9" * 9_000 + '"\n',
    "zone.toml": f'{TOML}window = "day"\ntz = "../../../../etc/passwd"\n',
    "long-zone.toml": f'{TOML}window = "day"\ntz = "{"a" * 9_000}"\n',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_policy_made_to_hurt_is_refused_soon_and_in_few_words(tmp_path: Path, name: str) -> None:
    """In a child with little memory and time, so that what hangs or grows is seen to fail."""
    path = write(tmp_path / name, BOMBS[name])

    def read() -> bool:
        with pytest.raises(PolicyError) as caught:
            read_policy(path)
        return len(str(caught.value)) < 10_000

    assert holds_in_a_child(read, memory_bytes=2**29, cpu_s=20)


def holds_in_a_child(check: Callable[[], bool], *, memory_bytes: int, cpu_s: int) -> bool:
    """Whether it is so in a process that may take so much more memory, and so much time."""
    import resource  # it is not there on every system

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    status = 1
    try:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory_bytes,) * 2)
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s,) * 2)
        status = 0 if check() else 1
    finally:
        os._exit(status)


def test_a_pipe_or_a_device_in_the_place_of_a_policy_holds_nobody_up(tmp_path: Path) -> None:
    path = write(tmp_path / "p.toml", TOML)
    watch = PolicyWatch(path, {})
    path.unlink()
    os.mkfifo(path)
    for _ in range(3):
        watch.look(MemoryStore(), lambda settings: pytest.fail("it was taken"))
    path.unlink()
    path.symlink_to("/dev/zero")
    for reads in (read_policy, lambda one: read_text(one, 10)):
        with pytest.raises((PolicyError, OSError), match="regular file"):
            reads(path)


def test_a_link_to_a_policy_is_followed(tmp_path: Path) -> None:
    """As Kubernetes mounts its files."""
    (tmp_path / "p.toml").symlink_to(write(tmp_path / "real.toml", TOML))
    assert [one.name for one in read_policy(tmp_path / "p.toml").budget] == ["b"]


def test_a_path_that_cannot_be_one_is_no_policy() -> None:
    for path in ("\0.toml", "a" * 5_000):
        with pytest.raises(PolicyError):
            read_policy(path)


# -- who may read and write


@pytest.mark.parametrize(
    ("mode", "folder", "may"),
    [
        (0o600, 0o755, ""),
        (0o660, 0o770, ""),
        (0o644, 0o755, "read"),
        (0o602, 0o755, "change"),
        (0o666, 0o755, "read and change"),
        (0o600, 0o777, "change"),
        (0o600, 0o1777, ""),
    ],
)
def test_what_everybody_may_do_with_a_store_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, folder: int, may: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    Bursar(f"sqlite:///{place / 'b.db'}", []).close()
    (place / "b.db").chmod(mode)
    place.chmod(folder)
    assert open_to_all(place / "b.db") == may
    with caplog.at_level(logging.WARNING, "bursar"):
        Bursar(f"sqlite:///{place / 'b.db'}").close()
    assert [f"may {may} it" in one.message for one in caplog.records] == ([True] if may else [])


def test_a_store_is_made_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Bursar(f"sqlite:///{tmp_path / 'b.db'}", [Budget("b", "1 USD")]) as bursar:
            bursar.charge("0.10 USD")
            made = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert made == {"b.db": 0o600, "b.db-wal": 0o600, "b.db-shm": 0o600}


def test_a_policy_that_everybody_may_change_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.toml", f'store = "memory:"\n{TOML}')
    path.chmod(0o644)
    Bursar.from_policy(path).close()
    assert "may change" not in CliRunner().invoke(main, ["policy", "check", str(path)]).output
    assert not caplog.records
    path.chmod(0o666)
    Bursar.from_policy(path).close()
    assert "may change the policy" in caplog.text
    assert "may change" in CliRunner().invoke(main, ["policy", "check", str(path)]).output


def test_a_key_that_everybody_may_read_is_warned_of(tmp_path: Path) -> None:
    url, key = f"sqlite:///{tmp_path / 'b.db'}", tmp_path / "key"
    Bursar(url, []).close()
    assert CliRunner().invoke(main, ["operator", "init", "--store", url, "--out", str(key)]).exit_code == 0
    freeze = ["freeze", "--everything", "--store", url, "--key", str(key)]
    assert "warning" not in CliRunner().invoke(main, freeze).output
    key.chmod(0o644)
    assert "may read or change" in CliRunner().invoke(main, freeze).output
    key.write_bytes(b"x" * 10_000_000)
    assert CliRunner().invoke(main, freeze).exit_code == 2


# -- paths of stores


def test_a_store_is_not_made_through_a_link(tmp_path: Path) -> None:
    """Else who may write to the folder chooses where it comes to lie, and who can read it there."""
    target = tmp_path / "elsewhere.db"
    (tmp_path / "b.db").symlink_to(target)
    with pytest.raises(StoreError) as caught:
        Bursar(f"sqlite:///{tmp_path / 'b.db'}")
    assert caught.value.fault == "unreachable"
    assert not target.exists()


def test_an_existing_store_may_lie_behind_a_link(tmp_path: Path) -> None:
    real = f"sqlite:///{tmp_path / 'real.db'}"
    Bursar(real, []).close()
    (tmp_path / "b.db").symlink_to(tmp_path / "real.db")
    with Bursar(f"sqlite:///{tmp_path / 'b.db'}") as bursar:
        bursar.charge("0.01 USD")
    with Bursar(real) as bursar:
        assert len(list(bursar.records())) == 1


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///:memory:",
        "sqlite:///%00",
        "sqlite:///a%00b",
        "sqlite://[x",
        "sqlite:///..",
        "sqlite:///b.db?mode=ro",
        "sqlite:///b.db?durability=none",
        "sqlite://host/b.db",
        "file:///etc/passwd",
        "postgresql://[::1/db",
        "postgresql://host/db?schema=a;drop",
        "",
        "\0",
    ],
)
def test_what_names_no_store_opens_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InvalidInput, StoreError)):
        open_store(url)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_store_is_left_as_it_is(tmp_path: Path) -> None:
    victim = write(tmp_path / "victim.txt", "not a database\n" * 100)
    with pytest.raises(StoreError) as caught:
        Bursar(f"sqlite:///{victim}", [])
    assert caught.value.fault == "damaged"
    assert victim.read_text() == "not a database\n" * 100
    with pytest.raises(StoreError):
        open_store(f"sqlite:///{'a' * 5_000}")
    with pytest.raises(StoreError):
        open_store(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@host/db",
        "postgresql://u:hun%74er2@host/db",
        "postgresql://u:hunter2@h1,h2/db?sslmode=require",
        "postgresql://u:p@hunter2@host/db",
        "postgresql://u:p/hunter2@host/db",
        "postgresql://u:hunter2 @host/db",
        "postgresql://u:hunter2%zz@host/db",
        "postgresql://u:hunter2@[::1/db",
        "postgresql://u:hunter2@host:99999/db",
        "postgresql://host/db?user=u&password=hunter2",
        "postgresql://host/db?sslpassword=hunter2&bogus=1",
        "postgrsql://u:hunter2@host/db",
        "redis://:hunter2@host:6379/0",
    ],
)  # fmt: skip
def test_a_password_of_a_url_is_shown_nowhere(url: str, tmp_path: Path) -> None:
    assert "hunter2" not in public_url(url)
    said = []
    with pytest.raises((InvalidInput, StoreError)) as caught:
        open_store(url.replace("host", "127.0.0.1:1").replace("h1,h2", "127.0.0.1:1"))
    error: BaseException | None = caught.value
    while error is not None:
        said.append(f"{error!r} {getattr(error, 'fields', '')}")
        error = error.__cause__
    (tmp_path / "p.json.yaml").write_text(json.dumps({"store": url}))
    told = CliRunner().invoke(main, ["policy", "check", str(tmp_path / "p.json.yaml"), "--store", "memory:"])
    assert told.exit_code == 0, told.output
    assert "hunter2" not in "".join((*said, told.output))
    assert ("holds a password" in told.output) == (public_url(url) != url)
