"""The exported policy against torch: 200 steps of identical inputs, and then left to itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_policy
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("mjlab", reason="the embedded simulator is not installed")

from dreamer_isaac import checkpoint, export
from dreamer_isaac.cli import compose
from dreamer_isaac.config import to_dict
from dreamer_isaac.envs import make_env
from dreamer_isaac.models import Agent

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["model.belief=64", "model.hidden=32", "model.units=32", "model.cnn_depth=4"]
CASES = {
    "ant": ["env.name=Isaac-Ant-v0", "model.categoricals=8", "model.classes=8"],
    "pixels": ["env.name=Isaac-Cartpole-RGB-v0", "env.image_size=32", "model.categoricals=8",
               "model.classes=8"],
    "both": ["env.name=Isaac-Cartpole-RGB-v0", "env.image_size=32", "env.pixels_only=false",
             "model.categoricals=8", "model.classes=8"],
    "v1": ["env.name=Isaac-Cartpole-v0", "algo=dreamer_v1", "model.gaussian=8"],
}  # fmt: skip
ROWS, STEPS = 4, 200


def inputs_of(case: str) -> tuple[Agent, dict[str, Any], list[dict[str, np.ndarray]]]:
    """An agent whose decisions differ from step to step, what a checkpoint says of it, and 200
    steps of what it sees on the simulator, with what it remembers."""
    cfg = compose([*CASES[case], *SMALL, f"env.num_envs={ROWS}", "evaluation.num_envs=1",
                   "env.backend=mjlab", "collector.frames_per_batch=4000"])  # fmt: skip
    env = make_env(cfg, "mjlab", torch.device("cpu"))
    info = env.info
    torch.manual_seed(0)
    agent = Agent(info.observation, info.action, cfg.model, cfg.algo, info.pixels).eval()
    with torch.no_grad():  # the last layers start near zero
        for p in agent.actor.parameters():
            p.add_(0.2 * torch.randn_like(p))
    meta = {
        "task": {"task": info.task, "backend": info.backend, "pixels": list(info.pixels or []),
                 "observation_names": info.observation_names, "action_names": info.action_names},
        "frames": 1, "updates": 2, "versions": {}, "config": to_dict(cfg),
    }  # fmt: skip
    policy = export.Policy(agent, 0.9)
    memory = export.example(agent, ROWS)
    steps, seen = [], env.reset()
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        memory |= {"observation": seen.obs, "is_first": seen.is_first}
        if seen.pixels is not None:
            memory["pixels"] = seen.pixels
        memory["noise"] = agent.draw_noise((ROWS,), generator)
        steps.append({k: v.numpy() for k, v in memory.items()})
        with torch.no_grad():
            action, belief, state = policy(*memory.values())
        memory |= {"action": action, "belief": belief, "state": state}
        _, _, seen = env.step(action)
    env.close()
    return agent, meta, steps


@pytest.mark.parametrize("case", CASES)
def test_torch_onnx_and_torchscript_agree(
    case: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    agent, meta, steps = inputs_of(case)
    files = export.write(agent, meta, 0.9, tmp_path)
    assert sorted(files) == ["json", "onnx", "pt"]
    loaded = {k: run_policy.load(files[k]) for k in ("onnx", "pt")}
    about = json.loads(files["json"].read_text())
    assert all(x.about == about for x in loaded.values())
    assert list(about["inputs"]) == list(steps[0])
    assert about["action_low"] == -0.9 and about["action_names"] == meta["task"]["action_names"]
    policy = export.Policy(agent, 0.9)

    def torch_step(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [x.numpy() for x in policy(*(torch.from_numpy(v) for v in inputs.values()))]

    worst = dict.fromkeys(loaded, 0.0)
    expected = [torch_step(inputs) for inputs in steps]
    for inputs, right in zip(steps, expected, strict=True):
        for kind, run in loaded.items():
            for got, want in zip(run(inputs), right, strict=True):
                worst[kind] = max(worst[kind], float(np.abs(got - want).max()))
    assert max(worst.values()) < 1e-4, worst
    actions = np.stack([e[0] for e in expected])
    assert actions.std(0).min() > 1e-3 and np.abs(actions).max() <= 0.9  # there is something to see

    # Left to itself every runtime goes its own way: rounding flips a latent sooner or later.
    drift = {}
    for kind, run in loaded.items():
        memory = {k: steps[0][k] for k in ("belief", "state", "action")}
        apart = []
        for inputs, right in zip(steps, expected, strict=True):
            action, belief, state = run({**inputs, **memory})
            memory = {"belief": belief, "state": state, "action": action}
            apart.append(float(np.abs(action - right[0]).max()))
        drift[kind] = max(apart)
    assert max(drift.values()) <= 1.8, drift  # bounded actions stay bounded
    record_property("closed_loop_drift", drift)
    print(f"{case}: same inputs {worst}, closed loop {drift}")


def test_other_numbers_of_rows(tmp_path: Path) -> None:
    agent, meta, steps = inputs_of("v1")
    files = export.write(agent, meta, 0.9, tmp_path)
    for kind in ("onnx", "pt"):
        run = run_policy.load(files[kind])
        whole = run(steps[5])
        for rows in (1, 2):
            part = run({k: v[:rows] for k, v in steps[5].items()})
            for a, b in zip(part, whole, strict=True):
                np.testing.assert_allclose(a, b[:rows], atol=1e-5)


def test_the_command_and_its_policy_on_a_simulator(
    program: Callable[..., subprocess.CompletedProcess[str]], toy_overrides: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    pixels = ["env.from_pixels=true", "env.image_size=16", "model.cnn_depth=2",
              "env.pixels_only=false"]  # fmt: skip
    done = program(*toy_overrides, *pixels, "evaluation.final=false")
    assert done.returncode == 0, done.stdout + done.stderr
    run = toy_overrides[-1].split("=", 1)[1]
    done = program("mode=export", f"checkpoint={run}", f"run.dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "policy.onnx" in done.stdout and "policy.pt" in done.stdout
    about = json.loads((tmp_path / "out" / "policy.json").read_text())
    assert about["env_cfg"] == {} and about["sees"]["image_size"] == 16
    found = checkpoint.find(run)
    meta = json.loads((found / "meta.json").read_text())
    del meta["config"]["env"]["pixels_only"]  # as of a version that had no such key
    meta["config"]["env"]["name"] = "Isaac-Of-Another-Simulator-v0"
    (found / "meta.json").write_text(json.dumps(meta))
    done = program("mode=export", f"checkpoint={run}", f"run.dir={tmp_path / 'old'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "old" / "policy.json").read_text())["sees"]["pixels_only"]
    code = """import sys, runpy
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    assert not e.code, e.code
bad = {"dreamer_isaac." + m for m in ("models", "train", "learner")} & set(sys.modules)
assert not bad, bad
"""
    results = []
    for kind in ("onnx", "pt"):
        played = subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "scripts" / "run_policy.py"),
             str(tmp_path / "out" / f"policy.{kind}"), "env.backend=toy", "--episodes", "12"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert played.returncode == 0, played.stdout + played.stderr
        assert played.stdout.startswith("return ") and "over 12 episodes" in played.stdout
        results.append(float(played.stdout.split()[1]))
    assert results[0] == pytest.approx(results[1], abs=0.5)  # the same seeds
    wrong = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "run_policy.py"), str(tmp_path / "none.onnx")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 1 and "is no file" in wrong.stderr
    missing = program("mode=export")
    assert missing.returncode == 2 and "mode=export needs checkpoint" in missing.stderr


def test_an_exported_policy_speaks_the_simulator_s_units() -> None:
    torch.manual_seed(0)
    cfg = compose([*SMALL, "env.name=Isaac-Cartpole-v0"])
    agent = Agent(4, 2, cfg.model, cfg.algo).eval()
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.add_(0.5 * torch.randn_like(p))
    inputs = export.example(agent, 5) | {
        "is_first": torch.zeros(5, dtype=torch.bool), "observation": torch.randn(5, 4),
        "action": torch.rand(5, 2) * 2 - 1,
    }  # fmt: skip
    with torch.no_grad():
        action, *memory = export.Policy(agent, 1.0)(*inputs.values())
        inputs["action"] = 0.5 * inputs["action"]
        half, *same = export.Policy(agent, 0.5)(*inputs.values())
    torch.testing.assert_close(half, 0.5 * action)
    assert half.abs().max() <= 0.5 and half.abs().max() > 0.05
    for a, b in zip(memory, same, strict=True):
        torch.testing.assert_close(a, b)
