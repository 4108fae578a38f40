"""Mistakes on the command line: one clear message each, exit code 2, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_sims
import pytest
from conftest import embedded

from dreamer_isaac import checkpoint, cli
from dreamer_isaac.cli import compose
from dreamer_isaac.config import ConfigError, build, leaves, merged, to_dict

ROOT = Path(__file__).resolve().parent.parent
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("env.num_env=4", ["env.num_env", "env.num_envs"]),
        ("collectr.total_frames=4", ["collectr.total_frames", "collector.total_frames"]),
        ("env.num_envs=many", ["env.num_envs='many'", "whole number"]),
        ("env.num_envs=1.5", ["env.num_envs=1.5", "whole number"]),
        ("env.num_envs=-3", ["env.num_envs=-3", "above 0"]),
        ("env.backend=gym", ["env.backend='gym'", "auto, isaaclab, mjlab"]),
        ("optimization.compile.enabled=7", ["optimization.compile.enabled=7", "auto, true, false"]),
        ("size=13m", ["size=13m", "12m", "tiny"]),
        ("collector.init_random_frames=100", ["init_random_frames=100", "batch_length", "Remedy"]),
        ("replay_buffer.batch_size=1000", ["batch_size=1000", "batch_length", "Remedy"]),
        ("replay_buffer.size=100", ["replay_buffer.size=100", "Remedy"]),
        ("collector.frames_per_batch=1000", ["frames_per_batch=1000", "num_envs", "Remedy"]),
        ("evaluation.num_envs=256", ["evaluation.num_envs=256", "Remedy"]),
        ("env.name=Isaac-Ant-v9", ["Isaac-Ant-v9", "Isaac-Ant-v0", "env.import"]),
        ("mode=evaluate", ["checkpoint=", "evaluation.policy=random"]),
        ("env.image_size=50", ["env.image_size=50", "multiple of 16", "image_size=48"]),
        ("env.cameras=[front]", ["env.cameras.front=front", "rear, side, top"]),
        ("env.cameras.a.position=[1,2,3]", ["env.cameras.a", "target"]),
        ("env.cameras.a={position:[1,2,3],target:[0,0,0],zoom:2}", ["unknown zoom"]),
        ("model.belief=100 model.blocks=8", ["model.belief=100", "model.blocks=8"]),
        ("checkpoint.init_modules=[brain]", ["brain", "encoder"]),
        ("env", ["env", "key=value"]),
        ("env.cfg.a.b", ["key=value"]),
        ("collector=ray", ["collector.kind", "auto, sync, thread"]),
        ("checkpoint.exact=true collector=thread", ["collector=sync"]),
        ("evaluation=4", ["section", "evaluation.episodes"]),
        ("model.size=12m", ["model.size", "size=<preset>"]),
        ("algo=dreamer_v1 size=12m", ["size=12m", "no size="]),
        ("algo=dreamer_v1 algo.entropy=1e-3", ["algo.entropy=0.001", "dreamer_v1"]),
        ("algo=dreamer_v1 optimization.agc=1", ["optimization.agc=1", "dreamer_v1"]),
        ("algo.grad_clip=10", ["algo.grad_clip=10", "dreamer_v3"]),
        ("collector.total_frames=100", ["before its first update", "init_random_frames=8192"]),
        ("lr=1e-4", ["unknown key 'lr'", "optimization.lr"]),
        ("env.seed=0,1", ["env.seed=0,1", "run once for each"]),
        ("model.encoder_layers=0", ["model.encoder_layers=0", "1 or more"]),
        ("model.unimix=0", ["model.unimix=0", "(0, 1)"]),
        ("replay_buffer.batch_length=1", ["replay_buffer.batch_length=1", "2 or more"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        compose(override.split(" "))
    for word in words:
        assert word in str(e.value)


def test_the_first_dreamer_has_no_blocks() -> None:
    assert compose(["algo=dreamer_v1", "model.belief=250"]).model.belief == 250


def test_all_mistakes_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as e:
        compose(["env.nme=a", "size=3m", "foo.bar=1"])
    assert len(e.value.problems) == 3


def test_exit_code_2_in_under_two_seconds(program: Program) -> None:
    start = time.monotonic()
    result = program("env.num_envs=abc")
    seconds = time.monotonic() - start
    assert result.returncode == 2
    assert "env.num_envs='abc'" in result.stderr and "Traceback" not in result.stderr
    assert seconds < 2.0


def test_defaults_of_a_run_from_pixels() -> None:
    for more in (["env.name=Isaac-Cartpole-RGB-v0"], ["env.from_pixels=true"]):
        cfg = compose(more)
        assert (cfg.env.num_envs, cfg.replay_buffer.size) == (32, 100_000)
        assert compose([*more, "replay_buffer.size=50000"]).replay_buffer.size == 50_000
        many = compose([*more, "env.num_envs=256"])
        assert (many.env.num_envs, many.collector.frames_per_batch) == (256, 2048)
    assert compose(["env.name=Isaac-Cartpole-RGB-v0", "env.from_pixels=false"]).env.num_envs == 256
    assert compose(["experiment=cartpole_rgb"]).env.num_envs == 256


@embedded
def test_the_bottom_layer_imports_no_torch() -> None:
    code = (
        "import sys; import dreamer_isaac.config, dreamer_isaac.cli, dreamer_isaac.launch;"
        "import dreamer_isaac.helpers;"
        "from dreamer_isaac.cli import compose; compose([]);"
        "import dreamer_isaac.launch as l; c = compose([]); l.choose_backend(c);"
        "bad = {'torch', 'numpy', 'mjlab', 'mujoco', 'warp', 'isaaclab'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_round_trip_and_free_paths() -> None:
    cfg = compose(["env.cfg.rewards.alive.weight=0.7", "env.import=a.b", "checkpoint.keep=7"])
    assert cfg.env.cfg == {"rewards": {"alive": {"weight": 0.7}}}
    assert cfg.env.import_ == "a.b" and cfg.checkpoint.keep == 7
    assert build(to_dict(cfg)) == cfg


def test_checkpoint_is_short_for_its_path() -> None:
    cfg = compose(["mode=evaluate", "checkpoint=runs/a, b=c/d"])
    assert cfg.checkpoint.path == "runs/a, b=c/d"


def test_sizes_are_the_reference_implementation_s() -> None:
    expected = {
        "1m": (512, 64, 4, 64),
        "12m": (2048, 256, 16, 256),
        "400m": (12288, 1536, 96, 1536),
    }
    for size, (belief, hidden, classes, units) in expected.items():
        model = compose([f"size={size}"]).model
        assert (model.belief, model.hidden, model.classes, model.units) == (
            belief, hidden, classes, units,
        )  # fmt: skip
        assert model.size == size and model.categoricals == 32


def test_an_unknown_task_may_be_the_user_s_own() -> None:
    assert compose(["env.name=My-Task", "env.import=my.tasks"]).env.name == "My-Task"
    assert compose(["env.name=Mjlab-Velocity-Flat-Unitree-Go1"]).env.name.endswith("Go1")


def test_help_and_cfg(program: Program) -> None:
    result = program("--help")
    assert result.returncode == 0 and "mode=evaluate" in result.stdout
    result = program("--cfg", "env.seed=5")
    assert result.returncode == 0 and "seed: 5" in result.stdout
    assert program("--nonsense").returncode == 2


# -- what a checkpoint says ----------------------------------------------------------------------


def stored(folder: Path, backend: str = "toy", **env: Any) -> Path:
    """The part of a checkpoint that is read before the simulator starts."""
    config = to_dict(compose(["env.backend=toy"]))
    config["env"] |= env
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text(json.dumps({
        "format": checkpoint.FORMAT, "files": {}, "config": config,
        "task": {"task": config["env"]["name"], "backend": backend, "step_dt": 0.1},
    }))  # fmt: skip
    return folder


def test_nested_mappings() -> None:
    below, above = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": {}}
    assert merged(below, above) == {"a": {"b": 1, "c": 4}, "d": 3, "e": {}}
    assert leaves(merged(below, above)) == {"a.b": 1, "a.c": 4, "d": 3, "e": {}}
    assert below == {"a": {"b": 1, "c": 2}, "d": 3}


def test_an_evaluation_is_on_the_task_that_was_changed_for_training(tmp_path: Path) -> None:
    run = stored(tmp_path / "c", cfg={"decimation": 4, "rewards": {"alive": {"weight": 5}}},
                 action_bound=0.5)  # fmt: skip
    given = ["mode=evaluate", "env.backend=toy", f"checkpoint={run}"]
    cfg = compose([*given, "env.cfg.decimation=2"])
    for _ in range(2):  # before the simulator starts, and where the log is open
        assert cli.as_trained(cfg) == ""
    assert cfg.env.cfg == {"decimation": 2, "rewards": {"alive": {"weight": 5}}}
    assert cfg.env.action_bound == 0.5
    other = compose([*given, "env.name=Isaac-Ant-v0", "env.cfg.decimation=4"])
    said = cli.as_trained(other)
    assert other.env.cfg == {"decimation": 4}
    assert "env.cfg.rewards.alive.weight=5, which is not taken over" in said
    assert "decimation" not in said
    stored(tmp_path / "c", "mjlab", cfg={"decimation": 4})
    elsewhere = compose([*given])
    assert "of mjlab with env.cfg.decimation=4" in cli.as_trained(elsewhere)
    assert elsewhere.env.cfg == {}


def test_a_stored_configuration_is_not_checked_again(tmp_path: Path) -> None:
    """It comes from where another simulator is installed, or from before a check."""
    run = stored(tmp_path / "c", name="Isaac-Velocity-Flat-Anymal-C-v0", backend="auto")
    raw = json.loads((run / "meta.json").read_text())["config"]
    raw["algo"] |= {"name": "dreamer_v1", "entropy": 1e-3}
    with pytest.raises(ConfigError):
        build(raw)
    assert build(raw, stored=True).env.name == "Isaac-Velocity-Flat-Anymal-C-v0"
    with pytest.raises(ConfigError, match=r"env\.new"):
        build(raw | {"env": raw["env"] | {"new": 1}}, stored=True)
    overrides = ["mode=export", f"checkpoint={run}"]
    cfg, _ = cli.read(overrides)
    assert cfg.env.name == "Isaac-Velocity-Flat-Anymal-C-v0"  # starts no simulator


def test_a_policy_that_sees_is_evaluated_in_few_envs(tmp_path: Path) -> None:
    run = stored(tmp_path / "c", from_pixels="true")
    cfg, _ = cli.read(["mode=evaluate", f"checkpoint={run}", "env.backend=toy"])
    assert (cfg.env.num_envs, cfg.env.from_pixels) == (32, "true")
    plain = stored(tmp_path / "d")
    cfg, _ = cli.read(["mode=evaluate", f"checkpoint={plain}", "env.backend=toy"])
    assert cfg.env.num_envs > 32


def test_keys_that_are_refused_now_do_not_keep_an_older_run_from_going_on() -> None:
    raw = to_dict(compose(["env.backend=toy"]))
    raw["env"]["cfg"] = {"seed": 3, "scene": {"num_envs": 64}, "sim": {"device": "cpu", "dt": 0.01}}
    assert build(raw, stored=True).env.cfg == {"sim": {"dt": 0.01}}
    with pytest.raises(ConfigError, match=r"set from env\.seed"):
        build(raw)


@pytest.mark.parametrize(
    "value", ["a b", "it's", r"joint_\d+", "\\'\\", "ü", "true", 0.5, [1, 2.5], None]
)
def test_changes_of_a_task_are_handed_on_as_they_are(value: Any) -> None:
    assert compose([f"env.cfg.x.y={compare_sims.written(value)}"]).env.cfg == {"x": {"y": value}}


def test_both_spellings_of_the_embedded_tasks() -> None:
    own = ["env.name=Isaac-Ant", "env.import=mine", "env.backend=mjlab"]
    assert compose(own).env.name == "Isaac-Ant"  # somebody's own
    assert compose(["env.name=Isaac-Ant", "env.backend=mjlab"]).env.name == "Isaac-Ant-v0"
    assert compose(["env.name=Isaac-Ant-v0", "env.backend=mjlab"]).env.name == "Isaac-Ant-v0"


@pytest.mark.parametrize(("path", "key"), [("scene.num_envs", "env.num_envs"), ("seed", "env.seed"),
                                           ("sim.device", "env.device")])  # fmt: skip
def test_what_has_a_key_of_its_own_is_not_set_behind_it(path: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"set from {key}"):
        compose([f"env.cfg.{path}=7"])
