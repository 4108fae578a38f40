"""Uploads to a real S3-speaking server on loopback that fails on purpose."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import TOY
from test_jobs import AS_TOY, job, write

from dreamer_isaac import cli
from dreamer_isaac.jobs.store import Folder, Publisher, StoreError, fetch_run, filesystem, patiently

REFUSAL = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Server:
    """moto's S3 behind a door that can be shut."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.app = DomainDispatcherApplication(create_backend_app)
        self.down = False
        self.every = 0
        """Refuse every so many-th upload."""
        self.refused = self.uploads = 0
        self._count = itertools.count(1)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environ: Any, start: Any) -> Any:
        upload = environ["REQUEST_METHOD"] in ("PUT", "POST")
        self.uploads += upload
        unlucky = bool(upload and self.every and next(self._count) % self.every == 0)
        if self.down or unlucky:
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [REFUSAL]
        return self.app(environ, start)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("moto")
    import fsspec

    own = Server()
    for key, value in {
        "AWS_ENDPOINT_URL": own.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    requests.post(f"{own.url}/moto-api/reset")  # its state is the process's
    filesystem("s3://asset")[0].mkdir("asset")
    yield own
    own.close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def there(url: str) -> dict[str, bytes]:
    """Every object below `url` with its content."""
    fs, root = filesystem(url)
    return {p.removeprefix(root + "/"): fs.cat_file(p) for p in fs.find(root)}


def here(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def upload_job(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.dumps(job("train", **more)).encode()
    filesystem("s3://asset")[0].pipe_file("asset/training/t.json", content)


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.cluster)])
def test_a_training_job_survives_a_failing_store(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """One upload in five is refused, and nothing at all is answered for a while in the middle."""
    upload_job(server, tmp_path, monkeypatch, maxIterations=10**6)
    server.every = 5
    began = time.monotonic()
    states: list[tuple[int, bool]] = []

    def outage() -> None:
        while server.uploads < 20:
            time.sleep(0.1)
        states.append((server.uploads, server.down))
        server.down = True
        time.sleep(seconds)
        server.down = False

    def stop() -> None:  # SIGTERM comes well after the outage, as from a scheduler
        import os
        import signal

        while not states or server.down or time.monotonic() - began < seconds + 6:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    for action in (outage, stop):
        threading.Thread(target=action, daemon=True).start()
    code = cli.run([*AS_TOY, "job=s3://asset/training/t.json", "job.id=one",
                    "collector.total_frames=100000000", "checkpoint.interval_frames=19200",
                    "logger.interval_frames=9600"])  # fmt: skip
    assert code == 143 and states and server.refused > 3
    folder = tmp_path / "runs" / "jobs" / "asset" / "one"
    local = here(folder)
    assert there("s3://asset/one") == local
    assert json.loads(local["result.json"])["status"] == "interrupted"
    models = [n for n in local if n.startswith("checkpoints/model_")]
    assert len(models) > 2 and "metrics.csv" in local
    frames = [line.split(",")[0] for line in local["metrics.csv"].decode().splitlines()[1:]]
    assert len(frames) == len(set(frames))


def test_a_retry_on_another_machine_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_job(server, tmp_path, monkeypatch)
    command = [*AS_TOY, "job=s3://asset/training/t.json", "job.id=one"]
    assert cli.run(command) == 0
    first = there("s3://asset/one")["log.txt"].decode()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)  # nothing of the first attempt is here
    upload_job(server, other, monkeypatch, maxIterations=9)
    assert cli.run(command) == 0
    log = there("s3://asset/one")["log.txt"].decode()
    assert log.startswith(first) and "resumed from" in log[len(first) :]
    result = json.loads(there("s3://asset/one")["result.json"])
    assert result["summary"]["updates"] == 9
    models = {n.rpartition("/")[2] for n in there("s3://asset/one") if "/model_" in n}
    assert set(result["checkpoints"]) == models and {"model_6.pt", "model_9.pt"} <= models
    rows = there("s3://asset/one")["metrics.csv"].decode().splitlines()[1:]
    frames = [int(r.split(",")[0]) for r in rows]
    assert frames == sorted(set(frames))


def test_an_evaluation_job_from_a_bucket(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_job(server, tmp_path, monkeypatch)
    assert cli.run([*AS_TOY, "job=s3://asset/training/t.json", "job.id=one"]) == 0
    fs = filesystem("s3://asset")[0]
    for name, settings in (
        ("path", {"checkpointPath": "checkpoints/model_6.pt"}),
        ("uri", {"policyS3Uri": "s3://asset/one/checkpoints/model_6.pt"}),
    ):
        fs.pipe_file("asset/evaluation/e.json", json.dumps(job("evaluate", **settings)).encode())
        code = cli.run(["env.backend=toy", "evaluation.video=false", "evaluation.open_loop_steps=5",
                        "job=s3://asset/evaluation/e.json", f"job.id={name}"])  # fmt: skip
        assert code == 0
        result = json.loads(there(f"s3://asset/{name}")["result.json"])
        assert result["checkpoint"] == "s3://asset/one/checkpoints/model_6.pt"
        assert "inputs/model_6.pt" not in there(f"s3://asset/{name}")  # it is there already


def test_what_cannot_be_uploaded_is_an_error(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    write(folder / "a.json", {})
    server.down = True
    left = Publisher(folder, "s3://asset/x").close(patience=3)
    assert len(left) == 1 and left[0].startswith("a.json: ")
    assert "uploads fail and will be tried again" in capsys.readouterr().out
    server.down = False
    assert Publisher(folder, "s3://asset/x").close(patience=3) == []
    assert there("s3://asset/x") == {"a.json": b"{}"}


def test_what_is_rotated_away_here_goes_there_too(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in ("1", "2"):
        write(folder / "checkpoints" / name / "meta.json", name)
    write(folder / "checkpoints" / "2.partial" / "meta.json", "unfinished")
    publisher = Publisher(folder, "s3://asset/x", interval=0.1)
    publisher.start()
    deadline = time.monotonic() + 20
    while len(there("s3://asset/x")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    (folder / "checkpoints" / "1" / "meta.json").unlink()
    assert publisher.close(patience=10) == []
    assert list(there("s3://asset/x")) == ["checkpoints/2/meta.json"]


def test_an_earlier_attempts_checkpoints_are_rotated_away(server: Server, tmp_path: Path) -> None:
    """A retry brings the newest here; the others stayed in the store for good."""
    fs = filesystem("s3://asset")[0]
    for name in ("01", "02", "03"):
        fs.pipe_file(f"asset/x/checkpoints/{name}/meta.json", b"{}")
    fs.pipe_file("asset/x/checkpoints/model_6.pt", b"1")
    folder = tmp_path / "run"
    write(folder / "checkpoints" / "03" / "meta.json", {})
    publisher = Publisher(folder, "s3://asset/x", keep=3)

    def kept() -> list[str]:
        assert publisher._pass() == []
        return sorted({n.split("/")[1] for n in there("s3://asset/x")})

    assert kept() == ["01", "02", "03", "model_6.pt"]
    write(folder / "checkpoints" / "04" / "meta.json", {})
    assert kept() == ["02", "03", "04", "model_6.pt"]
    for name in ("05", "06"):
        write(folder / "checkpoints" / name / "meta.json", {})
    (folder / "checkpoints" / "03" / "meta.json").unlink()
    assert kept() == ["04", "05", "06", "model_6.pt"]


def test_a_signal_while_uploading_leaves_seconds(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_job(server, tmp_path, monkeypatch)
    _, running = cli.read([*AS_TOY, "job=s3://asset/training/t.json", "job.id=one"])
    server.down = True
    assert running and running.publisher
    running.job.folder.mkdir(parents=True)
    hurry = running.publisher.hurry
    monkeypatch.setattr(running.publisher, "hurry", lambda _: hurry(1.0))
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begin = time.monotonic()
    assert running.finish(143) == 143 and time.monotonic() - begin < 60
    assert json.loads((running.job.folder / "result.json").read_text())["status"] == "interrupted"


def test_a_difference_is_found_and_mended(server: Server, tmp_path: Path) -> None:
    write(tmp_path / "run" / "a.json", [1, 2])
    publisher = Publisher(tmp_path / "run", "s3://asset/x")
    assert publisher.close(5) == []
    filesystem("s3://asset")[0].pipe_file("asset/x/a.json", b"[1, 3]")  # the same size
    assert publisher.close(5) == [] and there("s3://asset/x") == {"a.json": b"[1, 2]"}


def test_a_checkpoint_is_complete_there_before_it_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of it is refused: neither `meta.json` nor `latest` may say that it is there."""
    folder = tmp_path / "run" / "checkpoints"
    for name in ("5/learner.pt", "5/networks.pt", "5/meta.json", "latest"):
        write(folder / name, name)
    publisher = Publisher(tmp_path / "run", "s3://asset/x")
    send = publisher._send

    def refuse(fs: Any, target: str, path: Path) -> None:
        if path.name == "networks.pt":
            raise OSError("please reduce your request rate")
        send(fs, target, path)

    monkeypatch.setattr(publisher, "_send", refuse)
    assert publisher.close(patience=0)
    assert list(there("s3://asset/x")) == ["checkpoints/5/learner.pt"]
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)


def test_the_newer_checkpoint_is_taken(server: Server, tmp_path: Path) -> None:
    """A machine that had the job before has an older one than the store."""
    fs = filesystem("s3://asset")[0]
    for name, files in (("000300", ["a.pt"]), ("000900", ["a.pt"]), ("001200", [])):
        meta = json.dumps({"files": {"a.pt": {}}}).encode()
        fs.pipe_file(f"asset/x/checkpoints/{name}/meta.json", meta)
        for file in files:
            fs.pipe_file(f"asset/x/checkpoints/{name}/{file}", name.encode())
    write(tmp_path / "checkpoints" / "000300" / "meta.json", {})
    fetch_run("s3://asset/x", tmp_path)
    assert (tmp_path / "checkpoints" / "000900" / "a.pt").read_text() == "000900"
    assert not (tmp_path / "checkpoints" / "001200").exists()  # its file is missing there
    write(tmp_path / "checkpoints" / "002000" / "meta.json", {})
    (tmp_path / "checkpoints" / "000900" / "a.pt").unlink()
    fetch_run("s3://asset/x", tmp_path)  # this machine is further
    assert not (tmp_path / "checkpoints" / "000900" / "a.pt").exists()


def test_an_unfinished_checkpoint_is_not_fetched(server: Server, tmp_path: Path) -> None:
    fs = filesystem("s3://asset")[0]
    fs.pipe_file("asset/x/checkpoints/latest", b"5\n")
    fs.pipe_file("asset/x/checkpoints/5/networks.pt", b"half")
    fetch_run("s3://asset/x", tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_missing_and_unreachable_are_told_apart(server: Server) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        Folder("s3://asset").read("none.json")
    tries = []

    def failing() -> None:
        tries.append(1)
        raise ConnectionError("no route")

    with pytest.raises(StoreError, match="no route"):
        patiently(failing, "it", seconds=2)
    assert len(tries) > 1


def test_no_server_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from dreamer_isaac.jobs import store

    monkeypatch.setattr(store.patiently, "__defaults__", (1.0,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "x")
    assert cli.run([*TOY, "job=s3://asset/t.json"]) == 1
    assert "s3://asset/t.json: " in capsys.readouterr().err
