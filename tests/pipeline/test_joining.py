"""Joining a cluster that was started by `ray start`, whose workers cannot import our code by themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.environment import prepare_ray
from storage import UserError
from storage.verify import verify
from tests.pipeline.test_what_the_user_sees import ENCODERS, write_pictures

REPOSITORY = Path(__file__).parents[2]


def bare_environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "RAY_"))}
    return {**kept, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def python_without_us(tmp_path: Path) -> Path:
    """An environment with every package of this one but ours."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    # What is added by a .pth has its own .pth files ignored, and with them our editable installation.
    (Path(site) / "ours.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def address(python_without_us: Path, tmp_path: Path) -> Iterator[str]:
    """A cluster of that environment's, started in another folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = bare_environment(tmp_path)
    trial = [python_without_us, "-c", "import torch, ray\nimport pipeline"]
    refused = subprocess.run(trial, capture_output=True, text=True, cwd=elsewhere, env=environment)
    assert "No module named 'pipeline'" in refused.stderr
    ray = [str(python_without_us), "-m", "ray.scripts.scripts"]
    head = "start --head --node-ip-address 127.0.0.1 --num-cpus 4 --object-store-memory 200000000 --block".split()
    with open(tmp_path / "head.log", "w") as log:
        child = subprocess.Popen(
            [*ray, *head, "--include-dashboard=false", "--port", str(port), "--temp-dir", f"/tmp/ray-{port}"],
            cwd=elsewhere,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            for _ in range(240):
                with socket.socket() as probe:
                    probe.settimeout(0.5)
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert child.poll() is None, (tmp_path / "head.log").read_text()
            yield f"127.0.0.1:{port}"
        finally:
            child.terminate()
            child.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_code_reaches_workers_that_do_not_have_it(address: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    arguments = ["--data", "data", "--store", "store", *ENCODERS, "--ray-address", address]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "precompute", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # every path is relative to it
        env={**bare_environment(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert ", 3 encoded now" in done.stdout
    assert not list(verify(tmp_path / "store", deep=True))


def test_a_port_that_nobody_listens_on_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match=f"nothing answers at RAY_ADDRESS 127.0.0.1:{port}"):
        prepare_ray(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"must be auto, local, host:port or ray://host:port .*, got 'somewhere'"):
        prepare_ray("somewhere")


@pytest.mark.parametrize(("answers", "mode"), [(True, "disabled"), (False, "token")])
def test_a_driver_takes_the_clusters_mode_where_a_token_lies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: bool, mode: str
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back, absent or not
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("pipeline.cluster.environment._takes_anyone", lambda address: answers)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        prepare_ray(address)
        assert "RAY_AUTH_MODE" not in os.environ  # without a token there is nothing to choose
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("secret")
        prepare_ray(address)
        assert os.environ["RAY_AUTH_MODE"] == mode
        said = "disabled" if mode == "token" else "token"
        monkeypatch.setenv("RAY_AUTH_MODE", said)
        prepare_ray(address)
        assert os.environ["RAY_AUTH_MODE"] == said  # as the user says
