"""Job files: what is said of mistakes, which checkpoint is found, what comes out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY

from dreamer_isaac import cli, jobs
from dreamer_isaac.checkpoint import CheckpointError, Checkpoints, find, read_meta
from dreamer_isaac.jobs.store import StoreError

# The toy simulator has no task id that a job file could name.
AS_TOY = [o for o in TOY if not o.startswith(("env.num_envs", "collector.total_frames"))]


def job(mode: str, **settings: Any) -> dict[str, Any]:
    """A job file like the asset pipeline's."""
    given = {"mode": mode, "task": "Isaac-Cartpole-Direct-v0", "numEnvs": 12,
             "rlLibrary": "dreamer_isaac", **settings}  # fmt: skip
    if mode == "train":
        given.setdefault("maxIterations", 6)
    else:
        given = {"numEpisodes": 12, "stepsPerEpisode": 20} | given
    return {"name": f"A {mode} job", "description": "", "trainingConfig": given,
            "computeConfig": {"numNodes": 1}}  # fmt: skip


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_the_published_schema_is_one() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads(jobs.SCHEMA.read_text()))
    assert jobs.problems_of(job("train")) == [] == jobs.problems_of(job("evaluate"))


def test_six_mistakes_are_one_message_of_six_lines(tmp_path: Path, capsys: Any) -> None:
    content = job("train", numEnvs="many", rlLibrary="rsl_rl", numNodes=1)
    del content["description"], content["trainingConfig"]["maxIterations"]
    content["trainingConfig"]["task"] = "Isaac-Cartpol-Direct-v0"
    path = write(tmp_path / "job.json", content)
    assert cli.run([f"job={path}"]) == 2
    head, *lines = capsys.readouterr().err.strip().splitlines()
    assert head == f"error: {path} has 6 mistakes:"
    found = "\n".join(lines)
    assert len(lines) == 6
    for part in (
        "description is missing", "trainingConfig.maxIterations is missing",
        "trainingConfig.numNodes is unknown", 'trainingConfig.numEnvs: "many" is no integer',
        "'dreamer_isaac' only", "Did you mean Isaac-Cartpole-Direct-v0?",
    ):  # fmt: skip
        assert part in found
    assert list(tmp_path.iterdir()) == [path]  # nothing has started


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"numEnvs": 0}, "trainingConfig.numEnvs: 0 must be 1 or more."),
        ({"mode": "play"}, 'trainingConfig.mode: "play" is not one of train, evaluate.'),
        ({"maxIteration": 3}, "maxIteration is unknown; did you mean maxIterations?"),
        ({"policyS3Uri": "/x"}, "is not of the form s3://bucket/path."),
        ({"overrides": ["size"]}, "trainingConfig.overrides.0: \"size\" is not of the form key"),
        ({"numEnvs": True}, "trainingConfig.numEnvs: true is no integer."),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_path(change: dict[str, Any], line: str) -> None:
    content = job("train")
    content["trainingConfig"] |= change
    problems = jobs.problems_of(content)
    assert any(line in p for p in problems), problems


def test_what_is_no_json_and_no_object(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{'name': 1}")
    with pytest.raises(jobs.JobError, match="no JSON"):
        jobs.load(str(tmp_path / "job.json"))
    with pytest.raises(jobs.JobError, match="the file: a list is no object"):
        jobs.load(str(write(tmp_path / "list.json", [])))
    with pytest.raises(StoreError, match="does not exist"):
        jobs.load(str(tmp_path / "none.json"))


def test_several_nodes_need_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = job("train")
    content["computeConfig"]["numNodes"] = 2
    path = str(write(tmp_path / "job.json", content))
    with pytest.raises(jobs.JobError, match="2, but this job was started on 1"):
        jobs.load(path)
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "1234:0")
    monkeypatch.setenv("AWS_BATCH_JOB_NUM_NODES", "2")
    monkeypatch.setenv("AWS_BATCH_JOB_NODE_INDEX", "1")
    found = jobs.load(path)
    assert found.output == str(tmp_path / "1234-0" / "node-1") and found.node == 1
    chosen = jobs.overrides_of(found, [], cli.compose_unchecked)
    assert "env.seed=1" in chosen  # a seed of its own
    content["trainingConfig"] = job("evaluate")["trainingConfig"]
    touch(tmp_path, "model_1.pt")
    with pytest.raises(jobs.JobError, match="an evaluation runs on 1"):
        jobs.load(str(write(tmp_path / "job.json", content)))


def test_a_task_of_an_array_trains_a_seed_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "1234:2")
    monkeypatch.setenv("AWS_BATCH_JOB_ARRAY_INDEX", "2")
    path = write(tmp_path / "t.json", job("train", seed=10))
    cfg, running = cli.read([f"job={path}"])
    assert running is not None and running.job.id == "1234-2" and cfg.env.seed == 12


# -- which checkpoint ----------------------------------------------------------------------------


def found(path: Path) -> str:
    return jobs.load(str(path)).checkpoint


def test_checkpoint_path_is_looked_for_upwards(tmp_path: Path) -> None:
    asset = tmp_path / "asset"
    path = write(
        asset / "evaluation" / "e.json", job("evaluate", checkpointPath="checkpoints/m.pt")
    )
    with pytest.raises(jobs.JobError, match="There is: no checkpoint"):
        found(path)
    touch(asset, "checkpoints/m.pt")
    assert found(path) == str(asset / "checkpoints" / "m.pt")
    touch(asset, "evaluation/checkpoints/m.pt")  # the nearest one
    assert found(path) == str(asset / "evaluation" / "checkpoints" / "m.pt")


def test_the_topmost_folder_can_be_named(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c" / "d"
    path = write(deep / "e.json", job("evaluate", checkpointPath="checkpoints/m.pt"))
    touch(tmp_path, "checkpoints/m.pt")
    with pytest.raises(jobs.JobError):
        jobs.load(str(path))
    assert jobs.load(str(path), root=str(tmp_path)).checkpoint.startswith(str(tmp_path))


@pytest.mark.parametrize("wanted", ["/etc/passwd", "../../x.pt", "s3://b/x.pt"])
def test_checkpoint_path_stays_in_the_asset(tmp_path: Path, wanted: str) -> None:
    path = write(tmp_path / "e.json", job("evaluate", checkpointPath=wanted))
    with pytest.raises(jobs.JobError, match="must be relative"):
        found(path)


def test_the_last_number_counts_from_0_or_1(tmp_path: Path) -> None:
    touch(tmp_path, "checkpoints/model_100.pt", "checkpoints/model_500.pt")

    def asked(number: int) -> str:
        name = f"checkpoints/model_{number}.pt"
        return found(write(tmp_path / "e.json", job("evaluate", checkpointPath=name)))

    assert asked(499).endswith("model_500.pt") and asked(501).endswith("model_500.pt")
    assert asked(100).endswith("model_100.pt")
    for other in (99, 101, 498):  # not the last one
        with pytest.raises(jobs.JobError, match=r"model_100\.pt, .*model_500\.pt"):
            asked(other)


def test_the_only_file_beside_the_job(tmp_path: Path) -> None:
    path = write(tmp_path / "legacy" / "e.json", job("evaluate"))
    with pytest.raises(jobs.JobError, match=r"exactly one \.pt file \(there: none\)"):
        found(path)
    touch(tmp_path, "legacy/policy.pt")
    assert found(path) == str(tmp_path / "legacy" / "policy.pt")
    touch(tmp_path, "legacy/other.pt")
    with pytest.raises(jobs.JobError, match=r"there: other\.pt, policy\.pt"):
        found(path)


# -- running -------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """An asset with a finished training job `first`."""
    asset = tmp_path / "asset"
    path = write(asset / "training" / "cartpole-training-config.json", job("train"))
    assert cli.run([*AS_TOY, f"job={path}", "job.id=first"]) == 0
    return asset


def test_a_training_job_leaves_what_the_pipeline_expects(trained: Path) -> None:
    out = trained / "first"
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "succeeded" and result["exit_code"] == 0
    assert result["summary"]["updates"] == 6
    assert result["checkpoints"][-1] == "model_6.pt"
    given = trained / "training" / "cartpole-training-config.json"
    assert (out / "training-config.json").read_bytes() == given.read_bytes()
    assert (out / "metrics.csv").exists() and (out / "log.txt").exists()
    assert read_meta(out / "checkpoints" / "model_6.pt")["updates"] == 6


def test_an_evaluation_finds_it_and_caps_episodes(trained: Path) -> None:
    path = write(
        trained / "evaluation" / "e.json", job("evaluate", checkpointPath="checkpoints/model_5.pt")
    )
    assert cli.run(["env.backend=toy", "evaluation.video=false", "evaluation.open_loop_steps=5",
                    f"job={path}", "job.id=second"]) == 0  # fmt: skip
    out = trained / "second"
    result = json.loads((out / "result.json").read_text())
    assert result["checkpoint"] == str(trained / "first" / "checkpoints" / "model_6.pt")
    lengths = [line.split(",")[3] for line in (out / "metrics.csv").read_text().splitlines()[1:]]
    assert len(lengths) == 12 and max(map(int, lengths)) == 20
    assert (out / "evaluation-config.json").read_bytes() == path.read_bytes()
    assert "data:image/png" in (out / "report.html").read_text()


def test_an_id_may_be_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", job("train"))
    assert cli.read([f"job={path}", "job.id=12"])[1].job.id == "12"  # type: ignore[union-attr]


def test_the_same_id_goes_on(trained: Path) -> None:
    path = trained / "training" / "cartpole-training-config.json"
    content = json.loads(path.read_text())
    content["trainingConfig"]["maxIterations"] = 9
    assert cli.run([*AS_TOY, f"job={write(path, content)}", "job.id=first"]) == 0
    result = json.loads((trained / "first" / "result.json").read_text())
    assert result["summary"]["updates"] == 9
    assert "resumed from" in (trained / "first" / "log.txt").read_text()
    assert "model_6.pt" in result["checkpoints"]  # none is removed


def test_a_failed_job_says_so(
    tmp_path: Path, program: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = write(tmp_path / "e.json", job("evaluate"))
    (tmp_path / "policy.pt").write_text("of another library")
    done = program("env.backend=toy", f"job={path}", "job.id=x")
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    assert done.returncode == result["exit_code"] == 1 and result["status"] == "failed"
    assert "another library's, or damaged" in result["error"][0]


def test_a_rejected_job_of_a_scheduler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "abc#1")
    path = write(tmp_path / "training" / "t.json", job("train", size="1m"))
    assert cli.run([f"job={path}"]) == 2
    result = json.loads((tmp_path / "abc" / "result.json").read_text())
    assert result["status"] == "rejected"
    assert result["error"][0].startswith("trainingConfig.size is unknown")


@pytest.mark.parametrize("wrong", ["..", "../x", "training", "a/b", "a b"])
def test_ids_that_would_leave_the_asset(tmp_path: Path, wrong: str, capsys: Any) -> None:
    path = write(tmp_path / "asset" / "training" / "t.json", job("train"))
    assert cli.run([f"job={path}", f"job.id={wrong}"]) == 2
    assert "job.id=" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["optimization.replay_ratio=0", "env.num_envs=0",
                                   "collector.frames_per_batch=abc"])  # fmt: skip
def test_impossible_overrides_are_mistakes(tmp_path: Path, wrong: str, capsys: Any) -> None:
    path = write(tmp_path / "t.json", job("train", overrides=[wrong]))
    assert cli.run([f"job={path}"]) == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_an_evaluation_does_not_overwrite_a_training(trained: Path) -> None:
    before = (trained / "first" / "metrics.csv").read_bytes()
    wanted = job("evaluate", checkpointPath="checkpoints/model_6.pt")
    path = write(trained / "evaluation" / "e.json", wanted)
    assert cli.run(["env.backend=toy", f"job={path}", "job.id=first"]) == 2
    assert (trained / "first" / "metrics.csv").read_bytes() == before


def test_a_leftover_of_a_kill_costs_nothing(trained: Path) -> None:
    leftover = trained / "first" / "checkpoints" / "model_7.partial.pt"
    leftover.write_bytes(b"half")
    path = trained / "training" / "cartpole-training-config.json"
    content = json.loads(path.read_text())
    content["trainingConfig"]["maxIterations"] = 8
    assert cli.run([*AS_TOY, f"job={write(path, content)}", "job.id=first"]) == 0
    result = json.loads((trained / "first" / "result.json").read_text())
    assert result["checkpoints"][-1] == "model_8.pt" and not leftover.exists()


def test_overrides_of_the_file_and_of_the_command_line(tmp_path: Path) -> None:
    content = job("train", overrides=["size=1m", "env.num_envs=64"], seed=3)
    path = write(tmp_path / "t.json", content)
    cfg, _ = cli.read([f"job={path}", "optimization.lr=0.5"])
    assert (cfg.model.size, cfg.env.num_envs, cfg.env.seed) == ("1m", 64, 3)
    assert cfg.optimization.lr == 0.5 and cfg.optimization.max_updates == 6
    path = write(path, job("train", overrides=["sise=1m"]))
    with pytest.raises(jobs.JobError, match="sise"):
        cli.read([f"job={path}"])


@pytest.mark.parametrize("envs", [1, 2, 7, 100, 4096, 50000])
def test_sizes_fit_any_number_of_envs(tmp_path: Path, envs: int) -> None:
    path = write(tmp_path / "t.json", job("train", numEnvs=envs, maxIterations=500))
    cfg, _ = cli.read([f"job={path}"])  # which checks it
    updates = (cfg.collector.total_frames - cfg.collector.init_random_frames) / envs * (
        envs - cfg.evaluation.num_envs
    ) * cfg.optimization.replay_ratio / cfg.replay_buffer.batch_size  # fmt: skip
    assert updates >= 2 * 500  # frames must not end the run before its updates do


def test_model_files(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save_model(7, {"w": torch.arange(3.0)}, {"config": {}})
    assert find(path) == path and read_meta(path)["updates"] == 7
    assert torch.load(path, weights_only=True)["networks"]["w"].tolist() == [0, 1, 2]
    data = path.read_bytes()
    at = data.index(torch.arange(3.0).numpy().tobytes())
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        read_meta(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="no model file"):
        find(path)
