"""setup-and-run.sh where Isaac Lab has a Python of its own, which is a stand-in here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TOY

# As NVIDIA's wrapper: a shell that says something, runs Python as its child and passes no signal
# on.
WRAPPER = """#!/usr/bin/env bash
[ "$1" = -p ] || exit 9
shift
echo "[INFO] Using python from: {python}"
{python} "$@"
"""


@pytest.fixture
def container(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a container: Isaac Lab's folder and a copy of the project."""
    isaaclab = tmp_path / "isaaclab"
    isaaclab.mkdir()
    wrapper = isaaclab / "isaaclab.sh"
    wrapper.write_text(WRAPPER.format(python=sys.executable))
    wrapper.chmod(0o755)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "setup-and-run.sh").write_bytes((ROOT / "setup-and-run.sh").read_bytes())
    project = alone / "dreamer_isaac"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "origin")], check=True)
    for name in ("setup-and-run.sh", "requirements-container.lock"):  # as they are now
        (tmp_path / "origin" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qam", "x",
         "--allow-empty"], cwd=tmp_path / "origin", check=True,
    )  # fmt: skip
    yield os.environ | {
        "ISAACLAB_PATH": str(isaaclab), "DREAMER_ISAAC_REPOSITORY": str(tmp_path / "origin"),
        "OMP_NUM_THREADS": "1", "SCRIPT": str(alone / "setup-and-run.sh"), "HERE": str(project),
    }  # fmt: skip


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", env["SCRIPT"], *arguments], env=env, capture_output=True,
                          text=True, timeout=120)  # fmt: skip


def test_alone_it_fetches_the_project_and_changes_nothing_of_isaac_labs(
    container: dict[str, str],
) -> None:
    done = run(container, "--build-only")
    assert done.returncode == 0, done.stderr
    assert "Installed in Isaac Lab's Python" in done.stdout
    assert "torch and numpy are what they were" in done.stderr
    project = Path(container["HERE"])
    assert (project / "dreamer_isaac.py").exists() and not (project / ".venv").exists()
    assert not (project / ".isaaclab-missing").exists()  # everything was there: pip was not called
    again = run(container, "--build-only")
    assert again.returncode == 0 and "Checking" not in again.stderr  # once is enough


def test_a_fresh_container_with_the_same_project_is_installed_again(
    container: dict[str, str], tmp_path: Path
) -> None:
    """The project is mounted, the packages are the container's own."""
    assert run(container, "--build-only").returncode == 0
    other = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    wrapper = Path(container["ISAACLAB_PATH"]) / "isaaclab.sh"
    wrapper.write_text(WRAPPER.format(python=other / "bin" / "python"))
    done = run(container, "--build-only")
    assert done.returncode == 1 and "has no torch and numpy" in done.stderr


def test_alone_without_a_repository_it_says_how(container: dict[str, str]) -> None:
    del container["DREAMER_ISAAC_REPOSITORY"]
    done = run(container)
    assert done.returncode == 1 and "DREAMER_ISAAC_REPOSITORY=<url>" in done.stderr
    container["DREAMER_ISAAC_REPOSITORY"] = "/no/such/place"
    done = run(container)
    assert done.returncode == 1 and "cannot fetch /no/such/place" in done.stderr
    assert not Path(container["HERE"]).exists()


def test_a_torch_that_was_changed_is_an_error(container: dict[str, str], tmp_path: Path) -> None:
    """The wrapper lies about the version after the first question, as if pip had replaced it."""
    lie = tmp_path / "lie"
    lie.mkdir()
    (lie / "sitecustomize.py").write_text(
        "import importlib.metadata as m, pathlib\nreal = m.version\n"
        "def version(name):\n    if name != 'torch': return real(name)\n"
        f"    p = pathlib.Path({str(lie)!r}) / 'asked'\n"
        "    n = len(p.read_text()) if p.exists() else 0\n    p.write_text('x' * (n + 1))\n"
        "    return f'2.7.{n}'\nm.version = version\n"
    )
    done = run(container | {"PYTHONPATH": str(lie)}, "--build-only")
    assert done.returncode == 1
    assert re.search(r"torch was 2.7.0 and is 2.7.[1-9] now", done.stderr), done.stderr


def test_it_runs_and_passes_signals_on(container: dict[str, str], tmp_path: Path) -> None:
    toy = [o for o in TOY if not o.startswith("collector.total_frames")]
    out = tmp_path / "run"
    command = ["bash", container["SCRIPT"], *toy, "collector.total_frames=100000000",
               f"run.dir={out}"]  # fmt: skip
    process = subprocess.Popen(command, env=container, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (out / "metrics.csv").exists() and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM" in said
    assert (out / "checkpoints" / "latest").exists()  # it was waited for
    assert list((Path(container["HERE"]) / ".pids").iterdir()) == []


def test_what_a_killed_start_leaves_behind_is_ended(container: dict[str, str]) -> None:
    assert run(container, "--build-only").returncode == 0
    command = ["bash", container["SCRIPT"], "--python", "-c", "import time; time.sleep(600)"]
    first = subprocess.Popen(command, env=container)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    notes = Path(container["HERE"]) / ".pids"
    end = time.monotonic() + 30
    while not (notes.exists() and list(notes.iterdir())) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)
    first.kill()  # no chance to end its child
    first.wait()
    done = run(container, "--python", "-c", "print(6 * 7)")
    assert done.returncode == 0 and "42" in done.stdout
    assert "ending what an earlier run left behind" in done.stderr
    assert bystander.poll() is None and list(notes.iterdir()) == []
    bystander.kill()
    bystander.wait()
