"""Play an exported policy on a simulator, without the trainer:

    python dreamer_isaac.py mode=export checkpoint=runs/ant run.dir=exported
    python scripts/run_policy.py exported/policy.onnx --episodes 16 [key=value ...]

Takes `policy.onnx` (needs onnxruntime) or `policy.pt` (needs torch). The task is the one that the
policy was trained on; `env.*` keys are those of dreamer_isaac.py. Only the simulators' side of this
repository is imported; what `play` does is all that a robot's controller would have to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


class Onnx:
    """A `policy.onnx`."""

    def __init__(self, path: Path):
        try:
            import onnxruntime
        except ImportError:
            raise SystemExit(f"error: {path} needs onnxruntime. Remedy: pip install onnxruntime, "
                             "or policy.pt, which needs torch.") from None  # fmt: skip

        self.session = onnxruntime.InferenceSession(str(path))
        known = self.session.get_modelmeta().custom_metadata_map
        self.about: dict[str, Any] = json.loads(known["policy.json"])

    def __call__(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        # A task without a vector has no input for it either.
        wanted = {i.name for i in self.session.get_inputs()}
        out = self.session.run(None, {k: v for k, v in inputs.items() if k in wanted})
        return [np.asarray(x) for x in out]


class TorchScript:
    """A `policy.pt`."""

    def __init__(self, path: Path):
        import torch

        extra = {"policy.json": ""}
        self.module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        self.about: dict[str, Any] = json.loads(extra["policy.json"])

    def __call__(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        import torch

        with torch.no_grad():
            out = self.module(*(torch.from_numpy(v) for v in inputs.values()))
        return [x.numpy() for x in out]


def load(path: Path) -> Onnx | TorchScript:
    """By the file's suffix.

    Raises:
        SystemExit: with what was expected.
    """
    if not path.is_file():
        raise SystemExit(f"error: {path} is no file; mode=export writes policy.onnx and policy.pt")
    kinds: dict[str, Any] = {".onnx": Onnx, ".pt": TorchScript}
    if path.suffix not in kinds:
        raise SystemExit(f"error: {path}: only .onnx and .pt are policies")
    return kinds[path.suffix](path)


class Controller:
    """Remembers what the policy needs from one step to the next, for N rows."""

    def __init__(self, policy: Any, rows: int, seed: int = 0):
        self.policy, self.random = policy, np.random.default_rng(seed)
        self.shapes = {k: (rows, *v["shape"][1:]) for k, v in policy.about["inputs"].items()}
        kept = ("belief", "state", "action")
        self.memory = {k: np.zeros(self.shapes[k], np.float32) for k in kept}

    def act(
        self, observation: np.ndarray, is_first: np.ndarray, pixels: np.ndarray | None = None
    ) -> np.ndarray:
        """The actions [N, A] at this observation; `is_first` [N] starts an episode."""
        uniform = self.policy.about["noise"].startswith("uniform")
        draw = self.random.random if uniform else self.random.standard_normal
        given = {"observation": observation, "pixels": pixels, "is_first": is_first,
                 "noise": draw(self.shapes["noise"]).astype(np.float32), **self.memory}  # fmt: skip
        action, belief, state = self.policy({k: given[k] for k in self.shapes})
        self.memory = {"belief": belief, "state": state, "action": action}
        return action


def play(env: Any, controller: Controller, episodes: int) -> np.ndarray:
    """Returns of the first episodes of every env, `episodes` in all at least."""
    import torch

    rows = env.info.num_envs
    rounds = -(-episodes // rows)
    returns, done = np.zeros((rows, rounds)), np.zeros(rows, int)
    seen = env.reset()
    begun = np.zeros((rows, rounds), bool)
    for _ in range(env.info.max_episode_length * rounds + 1):
        if (done >= rounds).all():
            break
        pixels = None if seen.pixels is None else seen.pixels.cpu().numpy()
        action = controller.act(seen.obs.cpu().numpy(), seen.is_first.cpu().numpy(), pixels)
        _, outcome, seen = env.step(torch.from_numpy(action).to(env.device) / env.action_bound)
        reward, over = outcome.reward.cpu().numpy(), outcome.done.cpu().numpy()
        for i in np.flatnonzero(done < rounds):
            returns[i, done[i]] += reward[i]
            begun[i, done[i]] = True
        done += over & (done < rounds)
    return returns[begun]  # all, unless the task has no time limit


def main() -> int:
    from dreamer_isaac.config import ConfigError

    try:
        return run()
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def run() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--episodes", type=int, default=16)
    a = parser.parse_intermixed_args()
    policy = load(a.policy)
    about = policy.about
    from dreamer_isaac.cli import compose
    from dreamer_isaac.config import merged
    from dreamer_isaac.launch import choose_backend, simulator

    cfg = compose([
        "mode=evaluate", "evaluation.policy=zero", f"env.name={about['task']}",
        f"env.num_envs={min(a.episodes, 16)}", f"env.action_bound={about['action_high']}",
        *a.overrides,
    ])  # fmt: skip
    same = cfg.env.name.removesuffix("-v0") == about["task"].removesuffix("-v0")
    if same and choose_backend(cfg)[0] == about["trained_on"]:
        cfg.env.cfg = merged(about.get("env_cfg", {}), cfg.env.cfg)  # the task as it was trained
    elif about.get("env_cfg"):
        print(f"note: trained with env.cfg={about['env_cfg']}, which is not taken over here",
              file=sys.stderr)  # fmt: skip
    for key, value in about["sees"].items():
        setattr(cfg.env, key, value)
    with simulator(cfg):
        import torch

        from dreamer_isaac.envs import make_env

        auto = "cuda:0" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if cfg.env.device == "auto" else cfg.env.device)
        env = make_env(cfg, choose_backend(cfg)[0], device)
        shown = list(env.info.pixels or [])
        if shown != about["pixels"]:
            raise SystemExit(f"error: the policy sees pictures of {about['pixels'] or 'nothing'}, "
                             f"this task shows {shown or 'none'}")  # fmt: skip
        names = about["observation_names"], about["action_names"]
        if names != (env.info.observation_names, env.info.action_names):
            env.bind(*names)
        trained = about["step_seconds"] or env.info.step_dt
        if abs(trained / env.info.step_dt - 1) > 1e-3:
            print(f"note: the policy was trained at {1000 * trained:.1f} ms a step, and acts at "
                  f"{1000 * env.info.step_dt:.1f} ms here", file=sys.stderr)  # fmt: skip
        returns = play(env, Controller(policy, env.info.num_envs), a.episodes)
        env.close()
    one = len(returns) == 1
    error = "-" if one else f"{returns.std(ddof=1) / len(returns) ** 0.5:.3f}"
    print(f"return {returns.mean():.3f} +- {error} over {len(returns)} episodes")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
