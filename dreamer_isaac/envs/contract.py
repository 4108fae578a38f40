"""One contract for every simulator.

A `SimEnv` wraps a batched TorchRL env and hands out plain tensors, one `Step` per action, with
the meaning of DESIGN's time table:

    obs[t], is_first[t]                              on which action[t] is chosen
    reward[t+1], terminated[t+1], truncated[t+1]     what action[t] led to

After an episode's end the simulator has reset the env by itself, and `obs` is the first
observation of the next episode; what the simulator reports as `next` observation there (NaN, the
reset or the true terminal one) is never looked at.

Nothing that a simulator returns is ours: every tensor is cloned here, because simulators write
observations, rewards and flags in place and TorchRL hands some of them on as views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite
from torchrl.envs import EnvBase

from dreamer_isaac.config import ConfigError
from dreamer_isaac.envs import curriculum


class Observation(NamedTuple):
    """What is known before an action."""

    obs: Tensor
    """[N, O] float32, never NaN; O is 0 where only pictures are observed."""
    is_first: Tensor
    """[N] bool"""
    pixels: Tensor | None = None
    """[N, H, W, C] uint8, of this very state; None where the task has no cameras."""

    def clone(self) -> Observation:
        """The same values in tensors of one's own."""
        pixels = None if self.pixels is None else self.pixels.clone()
        return Observation(self.obs.clone(), self.is_first.clone(), pixels)

    def copy_(self, other: Observation) -> None:
        """Take another one's values."""
        for mine, given in zip(self, other, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)


class Outcome(NamedTuple):
    """What an action led to."""

    reward: Tensor
    """[N] float32"""
    terminated: Tensor
    """[N] bool: the episode ended by the task's own rules; there is no future."""
    truncated: Tensor
    """[N] bool: it was cut off; the value bootstraps through it."""

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated


@dataclass
class EnvInfo:
    """What the networks, checkpoints and reports need to know of a task."""

    task: str
    backend: str
    num_envs: int
    observation: int
    action: int
    step_dt: float
    """Seconds of simulated time per env step."""
    max_episode_length: int
    """Steps until truncation."""
    observation_names: list[str]
    """A name for every component, e.g. `joint_pos[slider_to_cart]`."""
    action_names: list[str]
    """The joint that every action component drives."""
    rewards_times_dt: bool = True
    """Whether the simulator multiplies rewards by the step's duration: managers do, Direct tasks do
    not."""
    pixels: tuple[int, int, int] | None = None
    """Height, width and channels (3 for every camera) of the pictures."""


class ObservationError(RuntimeError):
    """The simulator produced an observation or reward that is not finite."""


def check_specs(task: str, env: EnvBase, group: str) -> None:
    """Complain about a task that does not fit the contract: one vector observed (`group`; "" where
    none is), one vector of real numbers as action.

    Raises:
        ConfigError
    """
    problems = []
    if group:
        spec: Any = env.observation_spec.get(group, None)
        if spec is None:
            there = ", ".join(sorted(map(str, env.observation_spec.keys()))) or "nothing"
            problems.append(f"{task} has no observation group {group!r}. There: {there}.")
        elif isinstance(spec, Composite):
            parts = ", ".join(map(str, spec.keys()))
            problems.append(f"{task} observes several tensors ({parts}), one vector is needed. "
                            "Remedy: the group's concatenate_terms=true.")  # fmt: skip
        elif len(spec.shape) != 2:
            problems.append(f"{task} observes arrays of {list(spec.shape[1:])}, one vector is "
                            "needed. Remedy: env.from_pixels=true, which reads the colour cameras "
                            "of its scene or adds one (env.cameras); or no history that is not "
                            "flattened (flatten_history_dim).")  # fmt: skip
    action = env.action_spec
    if (
        isinstance(action, Composite)
        or len(action.shape) != 2
        or not action.dtype.is_floating_point
    ):
        problems.append(f"{task}: its actions are no vector of real numbers, which the policy is "
                        "made for.")  # fmt: skip
    if problems:
        raise ConfigError(problems)


class SimEnv:
    """A batched simulator under the contract above.

    Args:
        env: TorchRL env of batch size [N] with float observations under `key`; with
            `native_autoreset` or driven by TorchRL, both work.
        key: entry of the observation.
        action_bound: what an action of 1 is in the simulator's units.
    """

    sim: Any = None
    """The simulator's own environment, where there is one beneath TorchRL's."""

    def __init__(self, env: EnvBase, info: EnvInfo, key: str, action_bound: float):
        self.env, self.info, self.key, self.action_bound = env, info, key, action_bound
        self._td: TensorDictBase | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=env.device)
        cfg = getattr(self.sim, "cfg", None)
        self._finite_horizon = bool(getattr(cfg, "is_finite_horizon", False))
        self._observed: Tensor | None = None
        self._acted: Tensor | None = None

    @property
    def device(self) -> torch.device:
        device = self.env.device
        assert device is not None
        return device

    def reset(self) -> Observation:
        """Start a first episode in every env."""
        self._td = self.env.reset()
        first = torch.ones(self.info.num_envs, dtype=torch.bool, device=self.device)
        return Observation(self._clone_obs(self._td), first, self.pixels())

    def step(self, action: Tensor) -> tuple[Tensor, Outcome, Observation]:
        """Execute `action` [N, A], clipped to [-1, 1] and then scaled by `action_bound`.

        Returns:
            The action as executed, clipped and not scaled: the networks and the replay buffer know
            no other units. What it led to, and the next observation.
        """
        assert self._td is not None, "reset() comes first"
        executed = action.clamp(-1, 1)
        own = executed if self._acted is None else executed[:, self._acted]
        self._td.set("action", own * self.action_bound)
        result, self._td = self.env.step_and_maybe_reset(self._td)
        after = result["next"]
        outcome = Outcome(
            after["reward"].reshape(-1).to(torch.float32, copy=True),
            after["terminated"].reshape(-1).clone(),
            after["truncated"].reshape(-1).clone(),
        )
        if self._finite_horizon:  # the time limit is a real end
            outcome = Outcome(outcome.reward, outcome.done, torch.zeros_like(outcome.truncated))
        obs = self._clone_obs(self._td)
        td: Any = self._td
        seen = obs if self.info.observation else td.get(self.key, None)  # unseen: from pixels
        for part in seen.values(True, True) if isinstance(seen, TensorDictBase) else [seen]:
            if part is not None and part.is_floating_point():
                self._finite &= torch.isfinite(part).all()
        self._finite &= torch.isfinite(outcome.reward).all()
        return executed, outcome, Observation(obs, outcome.done.clone(), self.pixels())

    def _clone_obs(self, td: TensorDictBase) -> Tensor:
        if not self.info.observation:
            return torch.zeros(self.info.num_envs, 0, device=self.device)
        obs: Tensor = td.get(self.key)
        if self._observed is not None:
            obs = obs[:, self._observed]
        return obs.to(torch.float32, copy=True)

    def pixels(self) -> Tensor | None:
        """Pictures [N, H, W, C] uint8 of the state that the simulator is in, a copy; None where
        there are no cameras."""
        return None

    def check_finite(self) -> None:
        """Complain if any observation or reward since the last call was NaN or infinite.

        Raises:
            ObservationError
        """
        if not bool(self._finite):
            obs = None if self._td is None else self._clone_obs(self._td)
            where = "a reward or an earlier observation"
            if obs is not None and not torch.isfinite(obs).all():
                env, column = (~torch.isfinite(obs)).nonzero()[0].tolist()
                where = f"observation {self.info.observation_names[column]} of env {env}"
            raise ObservationError(
                f"{self.info.task}: the simulator returned NaN or infinity ({where}). A smaller "
                "time step (env.cfg.sim.mujoco.timestep) or a smaller env.action_bound often helps."
            )

    def reward_terms(self) -> tuple[list[str], Tensor]:
        """The parts of the last step's reward: their names and values [N, K], which sum to it.
        Without names where the simulator does not tell."""
        return [], torch.zeros(self.info.num_envs, 0, device=self.device)

    def endings(self, outcome: Outcome) -> tuple[list[str], Tensor]:
        """What may end an episode: names, and which of them hold for the last step [N, K] bool.
        Those that the task declares, or terminated and truncated where it declares none."""
        manager = getattr(self.sim, "termination_manager", None)
        names = [] if manager is None else list(manager.active_terms)
        if manager is None or not names:
            return ["terminated", "truncated"], torch.stack(
                [outcome.terminated, outcome.truncated], 1
            )
        return names, torch.stack([manager.get_term(n).reshape(-1).bool() for n in names], 1)

    def limit_episodes(self, steps: int) -> None:
        """Cut episodes off after `steps` from now on, unless the task does so earlier."""
        if steps < self.info.max_episode_length:  # all three simulators derive steps from seconds
            self.sim.cfg.episode_length_s = (steps - 0.5) * self.info.step_dt
            self.info.max_episode_length = int(self.sim.max_episode_length)

    def curriculum(self) -> dict[str, float]:
        """Levels of the task's curriculum by name, as it reports them; waits for the device."""
        return curriculum.levels(self.sim)

    def curriculum_state(self) -> dict[str, Any]:
        """What makes the next episodes as difficult as they would be now."""
        return curriculum.state(self.sim)

    def load_curriculum_state(self, state: dict[str, Any]) -> None:
        """Restore `curriculum_state`, before the next reset."""
        curriculum.restore(self.sim, state)

    def render(self, envs: int = 1) -> Any:
        """RGB frames, a list of [height, width, 3] uint8 of env 0, 1, ...; None where there is no
        renderer."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the simulation goes on.

        Raises:
            NotImplementedError: where the simulator cannot restore its state.
        """
        raise NotImplementedError(
            f"the {self.info.backend} backend cannot save and restore the simulator's state, which "
            "checkpoint.exact=true needs. Remedy: checkpoint.exact=false."
        )

    def load_state_dict(self, state: dict[str, Any]) -> Observation:
        """Restore `state_dict`; returns the observation at which it was taken."""
        raise NotImplementedError(
            f"the {self.info.backend} backend cannot restore the simulator's state."
        )

    def close(self) -> None:
        """End the simulation."""
        self.env.close()

    def bind(self, observation_names: list[str], action_names: list[str]) -> None:
        """From now on observe and act in this order: simulators order joints differently.

        Raises:
            ValueError: these are not this task's names.
        """
        info = self.info
        for mine, wanted in ((info.observation_names, observation_names),
                             (info.action_names, action_names)):  # fmt: skip
            if sorted(mine) != sorted(wanted) or len(set(mine)) != len(mine):
                odd = sorted(set(mine) ^ set(wanted))[:4]
                raise ValueError(f"other names: {', '.join(odd) or 'some are there twice'}")
        places = [info.observation_names.index(n) for n in observation_names]
        self._observed = torch.tensor(places, device=self.device)
        places = [action_names.index(n) for n in info.action_names]
        self._acted = torch.tensor(places, device=self.device)
        info.observation_names, info.action_names = list(observation_names), list(action_names)
