"""A toy simulator of known dynamics, for tests and for trying the trainer without physics.

With `pixels` it also shows a picture of itself: a bright column where the point is.

A point on a line is pushed by the action: x <- x + v dt, v <- v + 4 a dt. The reward is 1 - |x|
per step, times dt. An episode terminates when |x| > 1.5 and is truncated after 40 steps. Like the
real simulators it resets by itself, writes its buffers *in place* and hands them out as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from dreamer_isaac.envs.contract import EnvInfo, Observation, SimEnv

DT, LIMIT, LENGTH = 0.1, 1.5, 40


class PointEnv(EnvBase):
    """N points; observation (x, v, step / LENGTH), one action."""

    def __init__(
        self, num_envs: int, seed: int = 0, device: str | torch.device = "cpu", image: int = 0
    ):
        super().__init__(device=device, batch_size=torch.Size([num_envs]))
        self._torchrl_native_autoreset = True
        shape, batch = torch.Size([num_envs, 1]), torch.Size([num_envs])
        self.observation_spec = Composite(
            policy=Unbounded(torch.Size([num_envs, 3]), device=self.device), shape=batch
        )
        self.action_spec = Bounded(-torch.inf, torch.inf, shape, device=self.device)
        self.reward_spec = Unbounded(shape, device=self.device)
        flag = Categorical(2, shape=shape, dtype=torch.bool, device=self.device)
        self.done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=batch
        )
        self.length = LENGTH
        """Steps until truncation."""
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(seed)
        self.obs = torch.zeros(num_envs, 3, device=self.device)
        self.picture = torch.zeros(num_envs, image, image, 3, dtype=torch.uint8, device=self.device)
        self.reward = torch.zeros(shape, device=self.device)
        self.terminated = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.truncated = torch.zeros(shape, dtype=torch.bool, device=self.device)

    def _restart(self, mask: torch.Tensor) -> None:
        draw = torch.rand(len(self.obs), 2, generator=self.generator, device=self.device)
        fresh = torch.cat([2 * draw - 1, torch.zeros_like(draw[:, :1])], -1)
        self.obs.copy_(torch.where(mask, fresh, self.obs))
        columns = torch.linspace(-2, 2, self.picture.shape[2], device=self.device)
        bright = 255 * torch.exp(-((columns - self.obs[:, :1]) / 0.2).square())
        self.picture.copy_(bright[:, None, :, None].expand_as(self.picture))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        if tensordict is not None and "_reset" in tensordict:
            mask = tensordict["_reset"].reshape(-1, 1)
        else:
            mask = torch.ones_like(self.terminated)
        self._restart(mask)
        return TensorDict({"policy": self.obs}, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        x, v, clock = self.obs.clone().unbind(-1)
        v = v + 4 * tensordict["action"][:, 0] * DT
        x = x + v * DT
        clock = clock + 1 / LENGTH
        self.obs.copy_(torch.stack([x, v, clock], -1))
        self.reward.copy_(((1 - x.abs()) * DT).unsqueeze(-1))
        self.terminated.copy_((x.abs() > LIMIT).unsqueeze(-1))
        late = clock > (self.length - 0.5) / LENGTH
        self.truncated.copy_(late.unsqueeze(-1) & ~self.terminated)
        done = self.terminated | self.truncated
        self._restart(done)
        return TensorDict(
            {"policy": self.obs, "reward": self.reward, "done": done,
             "terminated": self.terminated, "truncated": self.truncated},
            self.batch_size, device=self.device,
        )  # fmt: skip

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)


class ToyEnv(SimEnv):
    """`PointEnv` under the contract."""

    env: PointEnv

    def __init__(
        self,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        bound: float = 1.0,
        image: int = 0,
        pixels_only: bool = True,
    ):
        names = ["position", "velocity", "clock"] if not image or not pixels_only else []
        info = EnvInfo(
            "Toy-Point", "toy", num_envs, len(names), 1, DT, LENGTH, names, ["push"],
            pixels=(image, image, 3) if image else None,
        )  # fmt: skip
        super().__init__(PointEnv(num_envs, seed, device, image), info, "policy", bound)

    def limit_episodes(self, steps: int) -> None:
        self.env.length = self.info.max_episode_length = min(steps, LENGTH)

    def pixels(self) -> torch.Tensor | None:
        return self.env.picture.clone() if self.info.pixels else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "obs": self.env.obs.clone(), "picture": self.env.picture.clone(),
            "generator": self.env.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> Observation:
        first = self.reset()
        self.env.obs.copy_(state["obs"])
        self.env.picture.copy_(state["picture"])
        self.env.generator.set_state(state["generator"].cpu())
        assert self._td is not None
        self._td.set("policy", self.env.obs)
        return Observation(self._clone_obs(self._td), first.is_first, self.pixels())
