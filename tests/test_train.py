"""Whole runs on the toy simulator: what they leave behind, resuming, and ways to break them."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamer_isaac import checkpoint, cli, train
from dreamer_isaac.checkpoint import CheckpointError, Checkpoints
from dreamer_isaac.cli import compose
from dreamer_isaac.config import ConfigError, LoggerConfig
from dreamer_isaac.envs.toy import PointEnv
from dreamer_isaac.learner import Learner
from dreamer_isaac.logger import Console, Logger
from dreamer_isaac.main import main
from dreamer_isaac.train import Limiter, Run

ROOT = Path(__file__).resolve().parent.parent
# Stopping by another total_frames would move the end of the learning rate's schedule.
EXACT = ["checkpoint.exact=true", "optimization.anneal=0"]
Program = Callable[..., subprocess.CompletedProcess[str]]


def folder(overrides: list[str]) -> Path:
    return Path(next(o for o in overrides if o.startswith("run.dir=")).split("=", 1)[1])


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as f:
        return [
            {k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(f)
        ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(checkpoint.find(run), ["networks", "learner"], torch.device("cpu"))
    optimizer = state["learner"]["optimizer"]
    return state["networks"] | {f"square.{k}": v for k, v in optimizer["square"].items()}


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_run_leaves_everything_that_is_promised(toy_overrides: list[str]) -> None:
    assert main(compose(toy_overrides)) == 0
    run = folder(toy_overrides)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["frames"] == 960 and summary["exit_reason"] == "finished"
    assert summary["updates"] == 8  # 8 batches after the random ones, 64 * 0.5 trained steps each
    evaluation = summary["evaluation"]
    assert evaluation["episodes"] == 12 and evaluation["return_stderr"] > 0
    for key in (
        "env",
        "backend",
        "versions",
        "device",
        "wall_seconds",
        "fps",
        "updates_per_second",
    ):
        assert summary[key], key
    for name in (
        "config.yaml",
        "metrics.csv",
        "log.txt",
        "plots/losses.png",
        "plots/learning_curve.png",
        "plots/open_loop.png",
        "checkpoints/latest",
    ):
        assert (run / name).stat().st_size > 0, name
    page = " ".join((run / "report.html").read_text().split())
    assert "trained policy after 960 frames and 8 updates, simulator toy, seed 0, 20" in page
    rows = metrics(run)
    frames = [int(r["frames"]) for r in rows]
    assert frames == list(range(96, 961, 96))
    assert float(rows[-1]["loss/total"]) > 0 and int(rows[-1]["updates"]) == summary["updates"]
    kept = Checkpoints(run / "checkpoints").complete()
    assert [p.name for p in kept] == ["000000000576", "000000000768", "000000000960"]
    assert (run / "checkpoints" / "latest").read_text().strip() == kept[-1].name


def test_limiter_pays_the_ratio_exactly() -> None:
    limiter = Limiter(ratio=0.5, batch=32, start=100)
    limiter.collected(frames=100, stored=1000)  # still the random phase
    assert sum(1 for _ in limiter.due(True)) == 0
    updates = 0
    for _ in range(10):
        limiter.collected(frames=200, stored=50)
        updates += sum(1 for _ in limiter.due(True))
    assert updates == 10 * 50 * 0.5 // 32
    limiter.collected(frames=200, stored=10_000)
    assert sum(1 for _ in limiter.due(False)) == 0 and limiter.credit == 0


@pytest.mark.parametrize(("floor", "least"), [(0.0, 0), (0.5, 0.5), (1.0, 1.0)])
def test_what_the_floor_does_not_ask_for_is_not_made_up_at_the_end(
    floor: float, least: float, toy_overrides: list[str]
) -> None:
    """The whole debt was paid in the last turn, at a learning rate of 0."""
    args = [*toy_overrides, "collector=thread", "evaluation.final=false",
            "optimization.replay_ratio=16", f"optimization.replay_ratio_floor={floor}"]  # fmt: skip
    assert main(compose(args)) == 0
    run = folder(args)
    updates = int(metrics(run)[-1]["updates"])
    asked = 768 * 2 / 3 * 16 / 32  # after the random phase, of the stored two thirds
    assert least * asked - 1 <= updates <= asked
    if not floor:
        assert updates < 0.75 * asked  # the toy is stepped in far less time than an update takes
    meta = checkpoint.read_meta(checkpoint.find(run))
    assert meta["limiter"]["paid"] == 32 * updates


def test_the_replay_ratio_that_is_logged_is_the_one_asked_for(toy_overrides: list[str]) -> None:
    assert main(compose([*toy_overrides, "evaluation.final=false"])) == 0
    ratios = [float(row["replay_ratio"]) for row in metrics(folder(toy_overrides))]
    assert ratios == [0.0] * 2 + [0.5] * 8  # of 12 envs 4 are only evaluated


def test_log_points_do_not_move_when_a_run_is_resumed(
    toy_overrides: list[str], tmp_path: Path
) -> None:
    args = [*toy_overrides, *EXACT, "logger.interval_frames=288", "evaluation.final=false",
            "checkpoint.interval_frames=384", "checkpoint.keep=9"]  # fmt: skip
    parts = [*args, f"run.dir={tmp_path / 'parts'}"]
    assert main(compose(args)) == 0
    for total in (480, 960):
        assert main(compose([*parts, f"collector.total_frames={total}"])) == 0
    for run, forced in ((folder(args), []), (tmp_path / "parts", [480])):
        rows = [int(row["frames"]) for row in metrics(run)]
        assert rows == sorted([288, 576, 864, 960, *forced])
        saved = [int(p.name) for p in Checkpoints(run / "checkpoints").complete()]
        assert saved == sorted([384, 768, 960, *forced])


PIXELS = ["env.from_pixels=true", "env.image_size=16", "model.cnn_depth=2"]


@pytest.mark.parametrize("more", [[], PIXELS], ids=["state", "pixels"])
def test_exact_resume_equals_never_stopping(
    more: list[str], toy_overrides: list[str], tmp_path: Path
) -> None:
    # At this ratio updates are still owed, in part, at every checkpoint.
    whole = [*toy_overrides, *EXACT, *more, "evaluation.final=false",
             "optimization.replay_ratio=0.4"]  # fmt: skip
    parts = [*whole, f"run.dir={tmp_path / 'parts'}"]
    assert main(compose(whole)) == 0
    for total in (288, 480, 960):
        assert main(compose([*parts, f"collector.total_frames={total}"])) == 0
    assert_same_run(folder(whole), tmp_path / "parts")


def test_a_run_of_an_older_version_resumes(toy_overrides: list[str]) -> None:
    """Keys that have come since are missing in what it saved; what they change is not."""
    assert main(compose([*toy_overrides, "collector.total_frames=480", *EXACT])) == 0
    run = folder(toy_overrides)
    path = checkpoint.find(run) / "meta.json"
    meta = json.loads(path.read_text())
    del meta["config"]["model"]["cnn_depth"], meta["config"]["env"]["cameras"]
    meta["config"]["env"]["from_pixels"] = False
    path.write_text(json.dumps(meta))
    assert main(compose([*toy_overrides, *EXACT])) == 0
    assert metrics(run)[-1]["frames"] == "960"


def test_a_run_goes_on_seeing_what_it_saw(toy_overrides: list[str]) -> None:
    small = [*toy_overrides, *PIXELS, "checkpoint.exact=false", "evaluation.final=false"]
    assert main(compose([*small, "collector.total_frames=480"])) == 0
    log = folder(toy_overrides) / "log.txt"
    for more, words in (
        (["env.from_pixels=false"], "pictures of [], but the run has [16, 16, 3]"),
        (["env.image_size=32"], "pictures of [32, 32, 3], but the run has [16, 16, 3]"),
        (["env.cameras=[top]"], "env.cameras={'top': 'top'}, but the run has {}"),
        (["env.pixels_only=false"], "env.pixels_only=False, but the run has True"),
    ):  # fmt: skip
        before = len(log.read_text())
        assert main(compose([*small, *more])) == 2
        assert words in log.read_text()[before:]
    assert main(compose(small)) == 0


@pytest.mark.parametrize("task", [
    "Isaac-Cartpole-v0", "Isaac-Ant-v0", "Isaac-Cartpole-RGB-v0",
])  # fmt: skip
@pytest.mark.cluster
def test_exact_resume_on_real_physics(
    task: str, toy_overrides: list[str], tmp_path: Path, program: Program
) -> None:
    pytest.importorskip("mjlab", reason="the embedded simulator is not installed")
    base = [*toy_overrides, *EXACT, "evaluation.final=false", "env.backend=mjlab",
            f"env.name={task}", "env.cfg.episode_length_s=0.5", "env.image_size=16",
            "model.cnn_depth=2"]  # fmt: skip
    for name, totals in (("whole", [960]), ("parts", [480, 960])):
        for total in totals:
            result = program(*base, f"run.dir={tmp_path / name}", f"collector.total_frames={total}")
            assert result.returncode == 0, result.stdout + result.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_without_replay_refills_it_first(toy_overrides: list[str]) -> None:
    assert main(compose([*toy_overrides, "collector.total_frames=480"])) == 0
    run = folder(toy_overrides)
    before = int(metrics(run)[-1]["updates"])
    assert main(compose(toy_overrides)) == 0
    rows = metrics(run)
    assert [int(r["frames"]) for r in rows] == list(range(96, 961, 96))
    assert int(rows[-1]["updates"]) > before
    assert "resumed" in (run / "log.txt").read_text()


def test_replay_is_saved_on_request(toy_overrides: list[str]) -> None:
    main(compose([*toy_overrides, "collector.total_frames=480", "checkpoint.replay=true"]))
    saved = checkpoint.find(folder(toy_overrides))
    state = checkpoint.load(saved, ["replay"], torch.device("cpu"))
    assert state["replay"]["written"] == 40


def test_logs_rewind_to_the_checkpoint(toy_overrides: list[str]) -> None:
    main(compose([*toy_overrides, "collector.total_frames=672"]))
    run = folder(toy_overrides)
    # As after a kill: the newest checkpoint is older than the last rows, one of them cut off.
    saved = Checkpoints(run / "checkpoints").complete()[-1]
    for p in saved.iterdir():
        p.unlink()
    saved.rmdir()
    with open(run / "metrics.csv", "a") as f:
        f.write("768,3")
    main(compose(toy_overrides))
    assert [int(r["frames"]) for r in metrics(run)] == list(range(96, 961, 96))


def test_a_torn_last_line_is_not_joined_to_the_next_row(tmp_path: Path) -> None:
    """Where no row came after the checkpoint: `3` and a row of frame 300 made frame 3300."""
    (tmp_path / "metrics.csv").write_text("frames,updates\n200,1\n3")
    logger = Logger(tmp_path, LoggerConfig(backend="csv"), {}, frames=200)
    logger.rewind(200)
    logger.write({"frames": 300, "updates": 2})
    assert [r["frames"] for r in logger.rows()] == ["200", "300"]


def test_another_configuration_in_the_same_folder_is_refused(
    toy_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(compose([*toy_overrides, "collector.total_frames=288"]))
    before = (folder(toy_overrides) / "config.yaml").read_text()
    assert main(compose([*toy_overrides, "model.units=16", "env.seed=3"])) == 2
    said = capsys.readouterr().out
    assert "model.units=16" in said and "env.seed=3" in said and "run.dir" in said
    assert (folder(toy_overrides) / "config.yaml").read_text() == before


def test_init_from_takes_the_chosen_modules(toy_overrides: list[str], tmp_path: Path) -> None:
    main(compose([*toy_overrides, "evaluation.final=false"]))
    source = weights(folder(toy_overrides))
    new = [*toy_overrides, f"run.dir={tmp_path / 'new'}", "collector.total_frames=192",
           "collector.init_random_frames=96", "optimization.replay_ratio=0.001",
           f"checkpoint.init_from={folder(toy_overrides)}", "evaluation.final=false",
           "checkpoint.init_modules=[rssm,critic]"]  # fmt: skip
    main(compose(new))  # no update yet
    got = weights(tmp_path / "new")
    for name, value in got.items():
        if name.split(".")[0] in ("rssm", "critic", "slow_critic"):
            assert torch.equal(value, source[name]), name
    assert not torch.equal(got["encoder.net.model.0.weight"], source["encoder.net.model.0.weight"])
    assert not got["square.rssm.mix.weight"].any()  # a fresh optimiser


def test_evaluate_a_run_and_the_baselines(toy_overrides: list[str], tmp_path: Path) -> None:
    main(compose([*toy_overrides, "evaluation.final=false"]))
    base = [*toy_overrides, "mode=evaluate", "env.num_envs=5", "evaluation.episodes=12"]
    out = tmp_path / "eval"
    assert main(compose([*base, f"run.dir={out}", f"checkpoint={folder(toy_overrides)}"])) == 0
    result = json.loads((out / "summary.json").read_text())
    assert result["evaluation"]["episodes"] == 15  # 5 envs, the same number from each
    for policy in ("random", "zero"):
        run = tmp_path / policy
        assert main(compose([*base, f"run.dir={run}", f"evaluation.policy={policy}"])) == 0
        assert json.loads((run / "summary.json").read_text())["policy"] == policy


def test_a_checkpoint_brings_its_task_unless_another_is_named(
    toy_overrides: list[str], tmp_path: Path
) -> None:
    main(compose([*toy_overrides, "env.name=Isaac-Ant-v0", "collector.total_frames=288",
                  "env.import=json", "evaluation.final=false"]))  # fmt: skip
    run = tmp_path / "moved, b=c"
    folder(toy_overrides).rename(run)

    def read(*overrides: str) -> tuple[str, str]:
        env = cli.read([*overrides])[0].env
        return env.name, env.import_

    for mode in ("evaluate", "export"):
        assert read(f"mode={mode}", f"checkpoint={run}") == ("Isaac-Ant-v0", "json")
        other = read(f"mode={mode}", f"checkpoint={run}", "env.name=Isaac-Humanoid-v0")
        assert other == ("Isaac-Humanoid-v0", "")
    assert read("mode=evaluate", "evaluation.policy=zero") == ("Isaac-Cartpole-v0", "")
    assert read("mode=evaluate", "checkpoint=runs/nowhere") == ("Isaac-Cartpole-v0", "")


def test_a_collecting_thread_is_not_made_to_wait_for_launches(toy_overrides: list[str]) -> None:
    for kind, ahead in (("thread", 0), ("sync", 2)):
        cfg = compose([*toy_overrides, f"collector={kind}"])
        assert Run(cfg, folder(toy_overrides), Console()).learner.ahead == ahead


def test_a_saved_replay_buffer_is_not_read_to_the_learners_device(
    toy_overrides: list[str],
) -> None:
    main(compose([*toy_overrides, "checkpoint.replay=true", "evaluation.final=false"]))
    found = checkpoint.find(folder(toy_overrides))
    state = checkpoint.load(found, ["networks", "replay"], torch.device("meta"))
    assert {v.device.type for v in state["networks"].values()} == {"meta"}
    assert {v.device.type for v in state["replay"]["data"].values()} == {"cpu"}


def test_a_finished_run_is_not_trained_further(toy_overrides: list[str]) -> None:
    args = [*toy_overrides, "optimization.max_updates=3", "evaluation.final=false"]
    run, seen = folder(toy_overrides), set()
    for _ in range(3):
        assert main(compose(args)) == 0
        summary = json.loads((run / "summary.json").read_text())
        meta = checkpoint.read_meta(checkpoint.find(run))
        seen.add((summary["exit_reason"], summary["frames"], meta["updates"], len(metrics(run))))
    assert len(seen) == 1 and next(iter(seen))[0] == "max_updates" and next(iter(seen))[2] == 3


def test_a_run_goes_on_where_its_generators_are_of_another_kind(
    toy_overrides: list[str], capsys: Any
) -> None:
    """As a CUDA generator's, whose state is 16 bytes: on another kind of device, or with the replay
    buffer moved."""
    args = [*toy_overrides, "checkpoint.replay=true", "evaluation.final=false"]
    half = [*args, "collector.total_frames=480"]
    for more, code in (([], 0), (EXACT, 2)):
        run = [f"run.dir={folder(args)}-{code}", *more]
        assert main(compose([*half, *run])) == 0
        found = checkpoint.find(folder(run))
        cuda = torch.zeros(16, dtype=torch.uint8)
        meta = json.loads((found / "meta.json").read_text())
        for name in ("learner", "replay", "exact"):
            path = found / f"{name}.pt"
            if path.exists():
                state = torch.load(path, weights_only=False)
                inner = {"learner": state, "replay": state.get("sampler"),
                         "exact": state.get("collector")}[name]  # fmt: skip
                inner["generator"] = cuda
                torch.save(state, path)
                meta["files"][path.name] = {
                    "bytes": path.stat().st_size, "crc32": checkpoint._crc(path),
                }  # fmt: skip
        (found / "meta.json").write_text(json.dumps(meta))
        assert main(compose([*args, *run])) == code
        assert ("another kind of device" in capsys.readouterr().out) == bool(code)


# -- breaking it -------------------------------------------------------------------------------


def test_a_replay_buffer_of_another_size_is_refused_before_anything_is_restored(
    toy_overrides: list[str], capsys: Any
) -> None:
    args = [*toy_overrides, "checkpoint.replay=true", "collector.total_frames=288",
            "evaluation.final=false"]  # fmt: skip
    assert main(compose(args)) == 0
    before = {p: p.stat().st_mtime_ns for p in (folder(args) / "checkpoints").rglob("*")}
    more = [*args, "collector.total_frames=480"]
    assert main(compose([*more, "replay_buffer.size=1280"])) == 2
    assert "replay_buffer.size" in capsys.readouterr().out
    assert not (folder(args) / "traceback.txt").exists()
    assert before == {p: p.stat().st_mtime_ns for p in (folder(args) / "checkpoints").rglob("*")}
    assert main(compose(more)) == 0  # and it still goes on


def test_errors_are_told_on_a_full_disk_and_without_an_old_traceback(
    toy_overrides: list[str], tmp_path: Path, capsys: Any
) -> None:
    console = Console(Path("/dev/full"))
    console.say("error: what went wrong")
    console.progress("a row", keep=True)
    console.close()
    assert capsys.readouterr().out == "error: what went wrong\na row\n"
    run = tmp_path / "other"
    run.mkdir()
    (run / "traceback.txt").write_text("of last week")
    args = [*toy_overrides, f"run.dir={run}", f"checkpoint.init_from={tmp_path / 'nowhere'}"]
    assert main(compose(args)) == 1
    assert "traceback" not in capsys.readouterr().out and not (run / "traceback.txt").exists()


def test_two_processes_do_not_train_in_one_folder(toy_overrides: list[str], capsys: Any) -> None:
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "f.write('process 7 on node3'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    run = folder(toy_overrides)
    run.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        assert main(compose(toy_overrides)) == 2
        assert "is in use by process 7 on node3" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()
    assert main(compose([*toy_overrides, "collector.total_frames=288"])) == 0


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    name = str(tmp_path / "runs" / "20261122-084430")
    assert [cli.claimed(name) for _ in range(3)] == [name, f"{name}-2", f"{name}-3"]
    assert cli.claimed("/proc/none") == "/proc/none"  # the run itself says what is wrong


def test_sigterm_outside_the_training_loop(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def build(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("dreamer_isaac.train.start_simulator", build)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(toy_overrides) == 143
    assert "stopped at once" in capsys.readouterr().out
    with cli.terminable():
        with pytest.raises(cli.Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # `timeout` sends it twice
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_checkpoint_of_the_same_frame_replaces_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    cpu = torch.device("cpu")
    checkpoints.save(5, {"networks": {"a": torch.zeros(1)}}, {})
    # What is removed has been replaced. (Between the two renames a kill still finds neither.)
    removed = []
    rmtree = shutil.rmtree

    def watched(path: Any, **more: Any) -> None:
        removed.append(Path(path).name)
        latest = checkpoints.latest()
        assert latest and checkpoint.load(latest, ["networks"], cpu)["networks"]["a"] == 1
        rmtree(path, **more)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoints.save(5, {"networks": {"a": torch.ones(1)}}, {})
    assert removed == ["000000000005.old.partial"]
    assert [p.name for p in tmp_path.iterdir()] != [] and len(checkpoints.complete()) == 1


def test_broken_checkpoints_are_refused_whole(toy_overrides: list[str], capsys: Any) -> None:
    main(compose([*toy_overrides, "collector.total_frames=288"]))
    run = folder(toy_overrides)
    saved = checkpoint.find(run)
    networks = saved / "networks.pt"
    content = networks.read_bytes()
    networks.write_bytes(content[:-100])
    assert main(compose(toy_overrides)) == 1
    assert "damaged" in capsys.readouterr().out
    networks.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(saved, ["networks"], torch.device("cpu"))
    networks.write_bytes(content)
    (saved / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint of dreamer_isaac.*Remedy: remove"):
        checkpoint.load(saved, ["networks"], torch.device("cpu"))
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.find("/no/such/place")


def test_networks_of_another_shape_are_not_half_loaded() -> None:
    a, b = torch.nn.Linear(3, 4), torch.nn.Linear(3, 5)
    before = b.weight.clone()
    with pytest.raises(CheckpointError, match=r"weight is \(4, 3\) there, \(5, 3\) here"):
        checkpoint.load_networks(b, a.state_dict(), Path("x"))
    assert torch.equal(b.weight, before)


def run_with(monkeypatch: pytest.MonkeyPatch, overrides: list[str], at: int, breaks: Any) -> int:
    """Run, with the simulator's step number `at` going through `breaks`."""
    step = PointEnv._step
    count = 0

    def broken(self: PointEnv, td: Any) -> Any:
        nonlocal count
        count += 1
        out = step(self, td)
        return breaks(out) if count == at else out

    monkeypatch.setattr(PointEnv, "_step", broken)
    return main(compose(overrides))


def test_nan_and_simulator_errors_end_with_1_and_an_intact_checkpoint(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def nan(out: Any) -> Any:
        out["policy"][2, 1] = torch.nan
        return out

    def crash(_: Any) -> Any:
        raise RuntimeError("the simulation exploded")

    for breaks, words in ((nan, "velocity of env 2"), (crash, "the simulation exploded")):
        with monkeypatch.context() as patch:
            # Step 49 is in the seventh batch of 8 steps; the last checkpoint is at 576 frames. A
            # resumed run starts there.
            assert run_with(patch, toy_overrides, 56 if breaks is nan else 3, breaks) == 1
        said = capsys.readouterr().out
        assert words in said and "error:" in said
        assert checkpoint.find(folder(toy_overrides)).name == "000000000576"
    assert main(compose(toy_overrides)) == 0


@pytest.mark.parametrize("more", [[], EXACT], ids=["plain", "exact"])
def test_what_was_learned_before_the_simulators_nan_is_saved(
    more: list[str], toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(out: Any) -> Any:
        out["policy"][2, 1] = torch.nan
        return out

    args = [*toy_overrides, *more, "checkpoint.interval_frames=10000000"]
    assert run_with(monkeypatch, args, 56, nan) == 1
    run = folder(args)
    if more:  # the simulator's state belongs to it, and is spoiled
        assert not Checkpoints(run / "checkpoints").complete()
        return
    meta = checkpoint.read_meta(checkpoint.find(run))
    assert meta["frames"] == 576 and meta["seconds"] >= float(rows_of_time(run)[-1])


def rows_of_time(run: Path) -> list[str]:
    with open(run / "metrics.csv") as f:
        return [row["time/seconds"] for row in csv.DictReader(f)]


def test_a_nan_loss_stops_with_the_batch_saved(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sample = train.Replay.sample

    def poisoned(self: Any) -> Any:
        batch = sample(self)
        if self.written > 60:
            batch["reward"][0, 0] = torch.nan
        return batch

    monkeypatch.setattr(train.Replay, "sample", poisoned)
    assert main(compose(toy_overrides)) == 1
    assert "NaN or infinite" in capsys.readouterr().out
    run = folder(toy_overrides)
    assert torch.load(run / "nonfinite_batch.pt", weights_only=False)["reward"].isnan().any()
    assert all(torch.isfinite(w).all() for w in weights(run).values())


def test_a_threaded_run_keeps_its_ratio_all_along(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector stands at its limit whenever the learner is the slower one: it goes on as soon
    as some of the debt is paid, not when all of it is."""
    trained = Learner.train

    def slowly(self: Learner, source: Any) -> Any:
        time.sleep(0.01)  # the slower one, also on a busy machine
        return trained(self, source)

    monkeypatch.setattr(Learner, "train", slowly)
    args = [*toy_overrides, "collector=thread", "optimization.replay_ratio=2",
            "collector.total_frames=9600", "logger.interval_frames=480", "evaluation.final=false",
            "checkpoint.interval_frames=9600", "replay_buffer.size=3200"]  # fmt: skip
    assert main(compose(args)) == 0
    ratios = [float(row["replay_ratio"]) for row in metrics(folder(args))]
    # In a row or two a busy machine may have left one thread alone; in bursts, hardly any is near.
    near = [0.6 <= r <= 3 for r in ratios]
    assert len(ratios) >= 18 and sum(near) >= 0.75 * len(near), ratios


@pytest.mark.parametrize("error", [FileNotFoundError(2, "x", "/robot.xml"),
                                   PermissionError(13, "x", "/robot.xml")])  # fmt: skip
def test_what_is_no_fault_of_a_disk_has_its_traceback(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, error: OSError
) -> None:
    def fails(self: Any, source: Any) -> None:
        raise error

    monkeypatch.setattr(Learner, "train", fails)
    assert main(compose(toy_overrides)) == 1
    said = capsys.readouterr().out
    assert "/robot.xml" in said and "free disk space" not in said
    assert "robot.xml" in (folder(toy_overrides) / "traceback.txt").read_text()


def test_tensorboard_shows_a_run_once_that_began_anew(toy_overrides: list[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = [*toy_overrides, "logger.backend=tensorboard", "evaluation.final=false"]
    for _ in range(2):
        assert main(compose(args)) == 0
        shutil.rmtree(folder(args) / "checkpoints")  # stopped before its first one, say
    events = accumulator.EventAccumulator(str(folder(args) / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("time/fps")] == list(range(96, 961, 96))


class InductorError(Exception):
    """As torch's compiler raises it."""

    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "replay_buffer.gpu_storage=false"),
        (InductorError("PassManager::run failed"), "optimization.compile.enabled=false"),
    ],
)
def test_an_error_of_torchs_says_what_helps(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception,
    key: str,
) -> None:  # fmt: skip
    def fails(self: Any, source: Any) -> None:
        raise error

    monkeypatch.setattr(Learner, "train", fails)
    assert main(compose(toy_overrides)) == 1
    said = capsys.readouterr().out
    assert f"error: {type(error).__name__}: {error}\nRemedy: " in said and key in said
    compose([*toy_overrides, key])  # the remedy is one


def test_full_disk_while_saving(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    main(compose([*toy_overrides, "collector.total_frames=288"]))
    before = weights(folder(toy_overrides))

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main(compose(toy_overrides)) == 1
    said = capsys.readouterr().out
    assert "No space left" in said and "Remedy" in said
    run = folder(toy_overrides)
    assert not list((run / "checkpoints").glob("*.partial"))
    after = weights(run)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_folder_that_becomes_read_only(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write = train.Logger.write

    def refused(self: Any, row: dict[str, float]) -> None:
        if row["frames"] > 600:
            raise PermissionError(13, "Permission denied", str(self.path))
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(train.Logger, "write", refused)
        assert main(compose(toy_overrides)) == 1
    said = capsys.readouterr().out
    assert "metrics.csv: Permission denied" in said and "Remedy" in said
    assert checkpoint.find(folder(toy_overrides)).name == "000000000576"
    assert main(compose(toy_overrides)) == 0


def test_a_run_folder_that_cannot_be_written(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = program(f"run.dir={tmp_path / 'file' / 'run'}", "env.backend=toy")
    assert result.returncode == 1
    assert "cannot be written" in result.stderr and "Traceback" not in result.stderr


def test_a_threaded_run_leaves_the_same_things(toy_overrides: list[str], capsys: Any) -> None:
    args = [*toy_overrides, "collector=thread", "evaluation.video=false"]
    assert main(compose(args)) == 0
    assert "collector: thread (asked for)" in capsys.readouterr().out
    run = folder(toy_overrides)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["frames"] == 960 and summary["evaluation"]["episodes"] == 12
    rows = metrics(run)
    # 768 frames after the random phase, of which two thirds are stored; at most the ratio, and at
    # least its floor, less what may be ahead.
    assert 0 < int(rows[-1]["updates"]) <= 768 * 2 / 3 * 0.5 / 32
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"time/learner_waited", "time/collector_waited", "eval/return"} <= set(header)
    assert main(compose([*args, "collector.total_frames=1440"])) == 0
    assert int(metrics(run)[-1]["frames"]) == 1440


V1 = ["algo=dreamer_v1", "model.belief=12", "model.hidden=12", "model.units=16", "model.gaussian=4"]


def test_dreamer_v1_trains_resumes_and_is_evaluated(toy_overrides: list[str]) -> None:
    args = [*toy_overrides, *V1, *EXACT, "evaluation.final=false", "evaluation.video=false"]
    assert main(compose(args)) == 0
    run = folder(toy_overrides)
    parts = [*args, f"run.dir={run.parent / 'parts'}"]
    for total in (480, 960):
        assert main(compose([*parts, f"collector.total_frames={total}"])) == 0
    assert_same_run(run, run.parent / "parts")
    evaluate = [f"run.dir={run.parent / 'evaluation'}", "env.backend=toy", "env.num_envs=4",
                "evaluation.num_envs=0", "mode=evaluate", f"checkpoint={run}"]  # fmt: skip
    assert main(compose(evaluate)) == 0
    summary = json.loads((run.parent / "evaluation" / "summary.json").read_text())
    assert summary["evaluation"]["episodes"] >= 64


def test_networks_and_losses_of_two_algorithms_are_not_mixed(toy_overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="algo=dreamer_v1 or algo=dreamer_v3"):
        compose([*toy_overrides, "algo.name=dreamer_v1"])


def test_a_crash_in_the_collectors_thread_saves_and_ends_with_1(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def crash(_: Any) -> Any:
        raise RuntimeError("the simulation exploded")

    args = [*toy_overrides, "collector=thread", "checkpoint.interval_frames=10000000"]
    assert run_with(monkeypatch, args, 50, crash) == 1
    said = capsys.readouterr().out
    assert "the simulation exploded" in said and "saved at" in said
    run = folder(toy_overrides)
    assert 0 < checkpoint.read_meta(checkpoint.find(run))["frames"] <= 576
    assert "in _run" in (run / "traceback.txt").read_text()


def test_a_signal_after_the_turns_decision_is_saved_too(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came between the save and the loop's condition, and everything since the last checkpoint
    was lost."""
    from dreamer_isaac.logger import Console

    calls = []
    show = Console.progress

    def progress(self: Console, text: str, keep: bool) -> None:
        calls.append(text)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        show(self, text, keep)

    monkeypatch.setattr(Console, "progress", progress)
    assert main(compose([*toy_overrides, "checkpoint.interval_frames=1000000"])) == 143
    run = folder(toy_overrides)
    saved = checkpoint.read_meta(checkpoint.find(run))
    assert saved["frames"] == int(float(metrics(run)[-1]["frames"])) == 6 * 96


@pytest.mark.parametrize(
    ("number", "code", "kind"),
    [(signal.SIGINT, 130, "sync"), (signal.SIGTERM, 143, "sync"), (signal.SIGINT, 130, "thread")],
)
def test_signals_save_and_exit(
    number: signal.Signals, code: int, kind: str, toy_overrides: list[str]
) -> None:
    args = [
        *toy_overrides,
        f"collector={kind}",
        "collector.total_frames=10000000",
        "checkpoint.interval_frames=10000000",
    ]
    process = start(args)
    run = folder(toy_overrides)
    wait_for(lambda: len(rows_of(run)) > 4)
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)  # as `timeout` does, to the program and then to its group
    begin = time.monotonic()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code, out
    assert time.monotonic() - begin < 5
    saved = checkpoint.read_meta(checkpoint.find(run))
    assert saved["frames"] == int(metrics(run)[-1]["frames"]) > 0
    assert json.loads((run / "summary.json").read_text())["exit_reason"] == number.name


def start(args: list[str], code: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "dreamer_isaac.py")]
    if code:
        command = [sys.executable, "-c", code]
    return subprocess.Popen(
        [*command, *args], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def rows_of(run: Path) -> list[dict[str, str]]:
    return metrics(run) if (run / "metrics.csv").exists() else []


KILL_AT_RENAME = """
import os, signal, sys
rename, count = os.rename, 0
def dying(a, b):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
os.rename = dying
import runpy
sys.argv[0] = "dreamer_isaac.py"
from dreamer_isaac import cli
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.cluster)])
def test_killed_at_any_moment_it_always_resumes(toy_overrides: list[str], kills: int) -> None:
    args = [*toy_overrides, "collector.total_frames=10000000", "evaluation.final=false"]
    run, rng = folder(toy_overrides), random.Random(0)
    reached = 0
    for attempt in range(kills):
        # Every third dies between writing a checkpoint and renaming it.
        process = start(args, KILL_AT_RENAME if attempt % 3 == 0 else "")
        if attempt % 3:
            first = len(rows_of(run))
            wait_for(lambda n=first, p=process: len(rows_of(run)) > n + 2 or p.poll() is not None)
            time.sleep(rng.random() * 0.3)
            process.kill()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, out
        if reached:
            assert f"{reached:,} frames" in out  # it went on from the newest complete one
        logged = int(rows_of(run)[-1]["frames"])
        saved = checkpoint.read_meta(checkpoint.find(run))["frames"]
        assert saved >= reached
        assert logged - saved <= 192 + 96  # one save interval, and the batch under way
        checkpoint.load(checkpoint.find(run), ["networks", "learner"], torch.device("cpu"))
        reached = saved
    frames = [int(r["frames"]) for r in rows_of(run)]
    assert frames == sorted(set(frames))
