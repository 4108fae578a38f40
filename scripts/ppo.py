"""PPO of rsl_rl on an embedded task, as a yardstick: `python scripts/ppo.py --task Isaac-Ant-v0`.

The hyperparameters are those that Isaac Lab ships for its Ant, but for the actions: they are
clipped to `env.action_bound`, 1, as Dreamer's are, where Isaac Lab clips none. Writes `curve.csv`
(frames, seconds since the first env step, mean return of the last N finished episodes, N envs;
every env's first one begins in the middle) and `result.json` with a deterministic evaluation, as
`dreamer_isaac.py` reports its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreamer_isaac.config import Config

ANT = {
    "num_steps_per_env": 32, "save_interval": 10**9, "check_for_nan": False,
    "obs_groups": {"actor": ["policy"], "critic": ["policy"]}, "logger": "tensorboard",
    "actor": {
        "class_name": "MLPModel", "hidden_dims": [400, 200, 100], "activation": "elu",
        "obs_normalization": False,
        "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 1.0,
                             "std_type": "scalar"},
    },
    "critic": {"class_name": "MLPModel", "hidden_dims": [400, 200, 100], "activation": "elu",
               "obs_normalization": False},
    "algorithm": {
        "class_name": "PPO", "value_loss_coef": 1.0, "use_clipped_value_loss": True,
        "clip_param": 0.2, "entropy_coef": 0.0, "num_learning_epochs": 5, "num_mini_batches": 4,
        "learning_rate": 5e-4, "schedule": "adaptive", "gamma": 0.99, "lam": 0.95,
        "desired_kl": 0.01, "max_grad_norm": 1.0, "rnd_cfg": None, "symmetry_cfg": None,
    },
}  # fmt: skip
"""Isaac Lab 3.0, `AntPPORunnerCfg`."""


class TimeUp(Exception):
    """The run has had its seconds."""


def configuration(task: str, num_envs: int, seed: int) -> Config:
    """Of the environment. What only Dreamer reads is set so that any number of envs passes."""
    from dreamer_isaac.cli import compose

    return compose([
        f"env.name={task}", f"env.num_envs={num_envs}", f"env.seed={seed}",
        "evaluation.num_envs=0", f"collector.frames_per_batch={num_envs}",
        f"collector.init_random_frames={1000 * num_envs}",
        f"collector.total_frames={2000 * num_envs}", f"replay_buffer.size={1000 * num_envs}",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="Isaac-Ant-v0")
    parser.add_argument("--num-envs", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=600.0, help="from the first env step on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/ppo"))
    arguments = parser.parse_args()

    cfg = configuration(arguments.task, arguments.num_envs, arguments.seed)
    from dreamer_isaac.envs.mjlab import make_mjlab  # before mjlab: see envs/__init__.py

    logging.disable(logging.INFO)
    import torch
    from mjlab.rl import RslRlVecEnvWrapper
    from rsl_rl.runners import OnPolicyRunner
    from torch import Tensor

    from dreamer_isaac.collect import EpisodeStats
    from dreamer_isaac.main import seed_everything, versions

    auto = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if arguments.device == "auto" else arguments.device)
    seed_everything(arguments.seed)
    sim: Any = make_mjlab(cfg, device, render=False)
    seed_everything(arguments.seed)
    stats = EpisodeStats(arguments.num_envs, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    curve = open(arguments.out / "curve.csv", "w", newline="", buffering=1)  # noqa: SIM115
    writer = csv.writer(curve)
    writer.writerow(["frames", "seconds", "return", "length", "episodes"])

    class Timed(RslRlVecEnvWrapper):
        """Counts frames and episodes, writes the curve while it grows, and ends the run."""

        steps = 0
        frames = 0
        started = 0.0
        seconds = 0.0
        training_return = 0.0

        def step(self, actions: Tensor) -> Any:
            if not self.started:
                self.started = time.monotonic()
            out = super().step(actions)
            stats.update(out[1], out[2].bool())
            self.steps += 1
            if self.steps % ANT["num_steps_per_env"] == 0:
                mean, length, count = stats.summary().tolist()  # waits for the device
                self.frames, self.training_return = self.steps * self.num_envs, mean
                self.seconds = time.monotonic() - self.started
                seconds = round(self.seconds, 3)
                writer.writerow([self.frames, seconds, round(mean, 4), round(length, 2), count])
                if self.seconds > arguments.seconds:
                    raise TimeUp
            return out

    env = Timed(sim.sim, clip_actions=cfg.env.action_bound)
    runner = OnPolicyRunner(env, ANT, None, str(device))
    with contextlib.suppress(TimeUp):
        runner.learn(10**9, init_at_random_ep_len=True)  # as Isaac Lab's and mjlab's train.py
    curve.close()

    policy = runner.get_inference_policy(device=str(device))
    returns = evaluate(env, policy, torch)
    result = {
        "algorithm": "PPO (rsl_rl)", "task": arguments.task, "num_envs": arguments.num_envs,
        "seed": arguments.seed, "frames": env.frames, "seconds": env.seconds,
        "training_return": env.training_return, "evaluation": {
            "return_mean": float(returns.mean()), "episodes": len(returns),
            "return_stderr": float(returns.std() / len(returns) ** 0.5),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }  # fmt: skip
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def evaluate(env: Any, policy: Any, torch: Any) -> Any:
    """The return of the first whole episode of every env, actions without noise."""
    from mjlab.rl import RslRlVecEnvWrapper

    envs = env.num_envs
    total = torch.zeros(envs, device=env.device)
    running = torch.ones(envs, dtype=torch.bool, device=env.device)
    with torch.inference_mode():
        obs, _ = env.reset()
        for _ in range(int(env.max_episode_length)):
            obs, reward, done, _ = RslRlVecEnvWrapper.step(env, policy(obs))  # not the counting one
            total += reward * running
            running &= ~done.bool()
    return total


if __name__ == "__main__":
    main()
