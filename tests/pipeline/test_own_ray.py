"""A Ray of the run's own: where its sockets lie, whose priority its workers have, who may talk to it."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import folder as folders
from pipeline.cluster.environment import NICENESS, prepare_ray
from pipeline.cluster.folder import ray_folder, why_not
from storage import UserError
from storage.verify import verify
from tests.pipeline.test_what_the_user_sees import ENCODERS, write_pictures

REPOSITORY = Path(__file__).parents[2]
LONG = "scratch/project/user/slurm_jobdir/1234567/tmp.node0016"
NOWHERE = "/proc/nowhere"  # in which nobody can make anything, not even root

LOOKS = """
import json, os, sys
os.nice(3)
from pipeline.cluster.environment import prepare_ray
address = prepare_ray(sys.argv[1])
import ray
from pipeline.cluster.connection import ray_cluster
def looks():
    return os.nice(0), os.path.realpath(ray._private.worker._global_node.get_session_dir_path())
with ray_cluster(address, verbose=False):
    niceness, folder = ray.get(ray.remote(looks).remote())
    print(json.dumps({"here": os.nice(0), "there": niceness, "folder": folder}))
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of the variables that Ray reads is set, and all are put back."""
    set_there = [name for name in os.environ if name.startswith("RAY_")]
    ours = "ADDRESS TMPDIR AUTH_MODE AUTH_TOKEN AUTH_TOKEN_PATH worker_niceness USAGE_STATS_ENABLED".split()
    for name in ["TMPDIR", *set_there, *(f"RAY_{name}" for name in ours)]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return monkeypatch


@given(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120))
def test_a_folder_that_will_do_has_room_for_a_socket_s_path(name: str) -> None:
    folder = Path("/tmp", name)
    if why_not(folder) is None:
        session = f"session_2026-11-26_16-04-38_600202_{os.getpid()}"
        assert len(os.fsencode(folder / session / "sockets/plasma_store")) <= 107


def test_what_a_folder_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert "room for a socket's" in str(why_not(tmp_path / LONG))
    assert why_not(Path("/tmp/not there/yet")) == "it has blanks or quotes in its path"
    assert why_not(Path(NOWHERE)) == "no such file or directory"
    assert why_not(Path("tmp")) == "it must be an absolute path"
    here = Path("/tmp") / f"ray-test-{os.getpid()}"
    assert why_not(here / "made/by/ray") is None
    assert not here.exists()
    here.touch()
    assert why_not(here / "ray") == "not a directory"
    here.unlink()

    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert why_not(Path("/tmp")) == "no space left on device"


@pytest.mark.parametrize("folder", [LONG, NOWHERE, "with blank"])
def test_another_folder_of_this_user_s_own_is_taken_and_removed(
    environment: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    environment.setenv("TMPDIR", str(tmp_path / folder))
    with ray_folder() as taken:
        found = os.lstat(taken)
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.getuid(), 0o700)
        assert why_not(Path(taken)) is None
    assert not os.path.lexists(taken)


def test_a_folder_that_is_named_for_ray_must_do(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("RAY_TMPDIR", "/tmp")
    environment.setenv("TMPDIR", NOWHERE)
    with ray_folder() as taken:
        assert taken == "/tmp/ray"
    environment.setenv("RAY_TMPDIR", str(tmp_path / LONG))
    with pytest.raises(UserError, match=r"Ray cannot work in RAY_TMPDIR .*107; name another folder"), ray_folder():
        pass
    environment.delenv("RAY_TMPDIR")
    environment.setattr(folders, "OTHERS", (NOWHERE, str(tmp_path / LONG)))
    with pytest.raises(UserError, match="set RAY_TMPDIR to a folder of a short path"), ray_folder():
        pass


@pytest.mark.parametrize("address", ["", " ", "local", " local\n"])
def test_a_cluster_of_our_own_needs_no_home(environment: pytest.MonkeyPatch, address: str) -> None:
    environment.setenv("HOME", NOWHERE)
    environment.setenv("RAY_AUTH_TOKEN_PATH", NOWHERE)  # of some other cluster
    assert prepare_ray(address) == ""
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert (os.environ["RAY_AUTH_MODE"], os.environ[NICENESS]) == ("token", "0")
    assert prepare_ray(address) == ""
    assert os.environ["RAY_AUTH_TOKEN"] == token


def test_what_the_user_has_set_is_left(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(NICENESS, "7")
    environment.setenv("RAY_AUTH_TOKEN", "mine")
    prepare_ray("")
    assert (os.environ["RAY_AUTH_TOKEN"], os.environ[NICENESS]) == ("mine", "7")
    environment.delenv("RAY_AUTH_TOKEN")
    environment.setenv("RAY_AUTH_MODE", "Disabled")
    prepare_ray("")
    assert "RAY_AUTH_TOKEN" not in os.environ
    environment.setenv("RAY_AUTH_MODE", "tokens")  # which Ray takes for disabled
    with pytest.raises(UserError, match="RAY_AUTH_MODE must be token or disabled, got tokens"):
        prepare_ray("")


@pytest.mark.parametrize(
    "address",
    [
        "host",
        "host:",
        "host:port",
        "host:0",
        "host:99999",
        "::1:6379",
        "[::1]",
        "a b:1",
        "http://h:1",
        "ray://",
        "h:1/x",
    ],
)
def test_addresses_of_no_form_are_refused(environment: pytest.MonkeyPatch, address: str) -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS must be auto, local, host:port or ray://host:port"):
        prepare_ray(address)


def test_an_address_of_six_is_tried(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("HOME", str(tmp_path))
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        assert prepare_ray(f" [::1]:{port} ") == f"[::1]:{port}"
        assert prepare_ray(f"ray://[::1]:{port}") == f"ray://[::1]:{port}"
    with pytest.raises(UserError, match=rf"nothing answers at RAY_ADDRESS \[::1\]:{port} \(.*refused\)"):
        prepare_ray(f"[::1]:{port}")
    assert NICENESS not in os.environ  # somebody else's workers


@pytest.mark.parametrize("content", [None, "", "\n", b"\xff\xfe"])
def test_a_token_that_cannot_be_read_is_named(
    environment: pytest.MonkeyPatch, tmp_path: Path, content: str | bytes | None
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_bytes(content.encode() if isinstance(content, str) else content)
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH .*token (is empty|cannot be read)"):
            prepare_ray(address)
        environment.delenv("RAY_AUTH_TOKEN_PATH")
        environment.setenv("HOME", NOWHERE)
        environment.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(UserError, match="RAY_AUTH_MODE is token and there is none"):
            prepare_ray(address)


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=250)


def test_workers_have_the_user_s_priority_and_sockets_a_short_path(tmp_path: Path) -> None:
    (tmp_path / LONG).mkdir(parents=True)
    done = run(["-c", LOOKS, "local"], TMPDIR=str(tmp_path / LONG), HOME=NOWHERE, RAY_AUTH_TOKEN_PATH=NOWHERE)
    assert done.returncode == 0, done.stderr
    looked = json.loads(done.stdout.splitlines()[-1])
    assert looked["there"] == looked["here"] == os.nice(0) + 3
    assert looked["folder"].startswith("/tmp/ray-")
    assert not Path(looked["folder"]).exists()
    assert not list((tmp_path / LONG).iterdir())


@pytest.mark.slow
def test_a_run_where_nothing_is_as_it_should_be(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    (tmp_path / LONG).mkdir(parents=True)
    arguments = ["-m", "pipeline", "precompute", "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store")]
    machine = {"TMPDIR": str(tmp_path / LONG), "HOME": NOWHERE, "RAY_ADDRESS": "local", "PYTHONIOENCODING": "ascii"}
    done = run([*arguments, *ENCODERS], **machine)
    assert done.returncode == 0, done.stderr
    assert ", 3 encoded now" in done.stdout
    assert not list(verify(tmp_path / "store", deep=True))


@pytest.mark.slow  # in default: a cluster that does not answer, in test_precompute.py
def test_nothing_is_made_before_ray_is_known_to_start(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    arguments = ["-m", "pipeline", "precompute", "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store")]
    for name, value in {"RAY_TMPDIR": NOWHERE, "RAY_ADDRESS": "nowhere", "RAY_AUTH_MODE": "any"}.items():
        done = run([*arguments, *ENCODERS], **{name: value})
        assert done.returncode == 2, done.stderr
        *waits, line = done.stderr.splitlines()
        assert f"{name} " in line
        assert all(" …" in each for each in waits)
        assert not (tmp_path / "store").exists()
