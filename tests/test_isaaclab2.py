"""Every task of Isaac Lab 2.3.2 with resolver, preflight and cameras, on its own configuration
classes (isaaclab2.py; no Isaac Sim). The asset server is one on loopback with files of our own
making."""

from __future__ import annotations

import collections
import json
import math
import posixpath
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from isaaclab2 import PACKAGES
from test_assets import R, Server, make

pytest.importorskip("pxr", reason="usd-core is not installed")
if not PACKAGES.is_dir():
    pytest.skip(f"{PACKAGES} is made by setup-and-run.sh --test", allow_module_level=True)

TASKS = 187
"""Registered by isaaclab 2.3.2.post1 and the packages beside it."""


def program(*arguments: Any) -> Any:
    """What isaaclab2.py writes."""
    out = Path(arguments[-1])
    command = [sys.executable, str(Path(__file__).with_name("isaaclab2.py")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return program("list", tmp_path_factory.mktemp("list") / "tasks.json")


def all_assets(tasks: dict[str, Any]) -> dict[str, str]:
    return {path: by for task in tasks.values() for path, by in task["assets"].items()}


def test_every_asset_that_the_tasks_name_is_found(tasks: dict[str, Any]) -> None:
    assert len(tasks) == TASKS
    found = all_assets(tasks)
    # By another walk through the same configurations: every URL, as it is spelled.
    spelled = {posixpath.normpath(url.split(f"/Assets/Isaac/{R}/")[1])
               for task in tasks.values() for url in task["urls"]}  # fmt: skip
    assert spelled - found.keys() == set()
    by_code = {path: by for path, by in found.items() if by.startswith("loaded by")}
    assert found.keys() - spelled == by_code.keys() - spelled
    kinds = collections.Counter(Path(path).suffix for path in spelled)
    assert kinds[".usd"] > 70 and kinds[".png"] == 25 and kinds[".hdr"] == 12 and kinds[".pt"] >= 3
    assert kinds[""] == 1  # a folder whose files a task's code puts together


def test_what_the_tasks_load_in_code_is_in_the_list(tasks: dict[str, Any]) -> None:
    ground = "Isaac/Environments/Grid/default_environment.usd"
    assert all(ground in task["assets"] for task in tasks.values())
    table = "Isaac/Props/Mounts/SeattleLabTable/table_instanceable.usd"
    for name in ("Isaac-Factory-PegInsert-Direct-v0", "Isaac-Forge-GearMesh-Direct-v0",
                 "Isaac-AutoMate-Assembly-Direct-v0"):  # fmt: skip
        assert tasks[name]["assets"][table].startswith("loaded by isaaclab_tasks.direct.")
        assert not any(table in url for url in tasks[name]["urls"])
    assert table not in tasks["Isaac-Ant-v0"]["assets"]


def test_a_camera_for_every_task(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        cameras = task["cameras"]
        assert not task["why not"] and set(cameras) == {"camera_side", "camera_far"}, name
        assert task["spacing"] >= 40
        for key, position, target in (("camera_side", (0, -3, 1), (0, 0, 0.2)),
                                      ("camera_far", (9, 0, 2), (0, 0, 1))):  # fmt: skip
            camera = cameras[key]
            assert camera["kind"] == "TiledCameraCfg" and camera["size"] == [64, 64]
            assert camera["convention"] == "opengl"
            expected = [a + b for a, b in zip(task["root"], position, strict=True)]
            assert camera["pos"] == pytest.approx(expected)
            # An OpenGL camera looks along its own -z; 2.3's quaternions are (w, x, y, z).
            w, x, y, z = camera["rot"]
            ahead = (-2 * (x * z + w * y), -2 * (y * z - w * x), -(1 - 2 * (x * x + y * y)))
            way = [b - a for a, b in zip(position, target, strict=True)]
            assert ahead == pytest.approx([v / math.hypot(*way) for v in way], abs=1e-6)


SHARED = "Isaac/Props/Shared/steel.usd"
GROUND = "Isaac/Environments/Shared/deep/plate.usd"
PICTURE = "NVIDIA/Materials/Shared/steel.png"


def usd(
    path: str, *, references: tuple[str, ...] = (), payload: str = "", texture: str = ""
) -> bytes:
    """A layer at `path` that refers to others by paths relative to itself."""

    def at(other: str) -> str:
        return posixpath.relpath(other, posixpath.dirname(path))

    lines = ["#usda 1.0", "(", 'defaultPrim = "A"', ")", 'def Xform "A" (']
    if references:
        lines.append(
            "prepend references = [" + ", ".join(f"@{at(r)}@</A>" for r in references) + "]"
        )
    if payload:
        lines.append(f"prepend payload = @{at(payload)}@</A>")
    lines += [")", "{", *([f"asset inputs:t = @{at(texture)}@"] if texture else []), "}", ""]
    return "\n".join(lines).encode()


def bucket(paths: set[str]) -> dict[str, bytes]:
    """A file for every asset; each USD needs one beside it and, through two others in other
    categories, a picture in a third."""
    files = {SHARED: usd(SHARED, payload=GROUND), PICTURE: b"steel"}
    files[GROUND] = usd(GROUND, texture=PICTURE)
    for path in paths:
        if path.endswith(".usd"):
            part = f"{path.removesuffix('.usd')}_parts/mesh.usd"
            files[path] = usd(path, references=(part, SHARED))
            files[part] = usd(part)
        elif path.endswith(".mdl"):
            files[path] = b"mdl 1.4;"
        elif not Path(path).suffix:
            files |= {f"{path}/{n}": usd(f"{path}/{n}", references=(SHARED,))
                      for n in ("plug.usd", "socket.usd")}  # fmt: skip
        else:
            files[path] = path.encode()
    return {f"Assets/Isaac/{R}/{path}": data for path, data in files.items()}


def test_a_mirror_serves_every_task_without_a_network(
    tasks: dict[str, Any], tmp_path: Path
) -> None:
    wanted = set(all_assets(tasks))
    server = Server(bucket(wanted))
    server.page = 1000
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    from dreamer_isaac.assets.mirror import Asset

    try:
        report = make(server, tmp_path / "mirror").run([Asset(R, p) for p in sorted(wanted)])
    finally:
        server.shutdown()
        server.server_close()
    assert not report.missing and not report.failed and not report.outside
    assert {f"Assets/Isaac/{R}/{a.path}" for a in report.fetched} == set(server.files)

    result = program("check", tmp_path / "mirror", tmp_path / "checked.json")
    assert result["tasks"] == TASKS
    assert result["preflight"] == {} and result["absent"] == [] and result["broken"] == {}
    assert result["urls"] == []  # nothing is left that would be fetched
    assert result["opened"] > 70
    assert result["report"].endswith("0 fetched, 0 missing")

    # The check can fail: without one file of another category that no task names.
    (tmp_path / "mirror" / f"Assets/Isaac/{R}" / GROUND).unlink()
    result = program("check", tmp_path / "mirror", tmp_path / "again.json")
    assert len(result["broken"]) > 70 and len(result["preflight"]) == TASKS
