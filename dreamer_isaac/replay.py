"""Replay: TorchRL's `LazyTensorStorage` as a ring over time, with our own slice sampler.

Only one thread may touch it (the learner's): concurrent `extend` and `sample` on CUDA storage race
across streams (TorchRL issue 3463).

The storage is [time, env]; batches come in as [env, time], which `ReplayBuffer` transposes for
`ndim=2`. A slice is T+1 consecutive records of one env, drawn uniformly over every (env, start)
whose slice lies wholly in the written part of the ring. It may cross episode ends (`is_first`
marks them), so that episodes shorter than a slice are trained too, which TorchRL's `SliceSampler`
never does; it never crosses the write head.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from dreamer_isaac.config import ModelConfig, ReplayConfig


class RingSliceSampler(Sampler):
    """Uniform over (env, start); needs no value from the device.

    Args:
        length: records of a slice, T+1. generator: draws the indices, on the storage's device.
    """

    def __init__(self, length: int, generator: torch.Generator):
        self.length, self.generator = length, generator
        self.cursor = 0
        self.last_index: tuple[Tensor, Tensor] | None = None

    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict]:
        """Indices (time, env) of `batch_size` records, slice after slice.

        Raises:
            ValueError: when fewer than T+1 steps are stored.
        """
        filled, envs = storage.shape
        starts = filled - self.length + 1
        if starts < 1:
            raise ValueError(f"{filled} steps are stored, a slice needs {self.length}.")
        device = self.generator.device
        slices = batch_size // self.length
        draw = torch.randint(starts * envs, (slices,), generator=self.generator, device=device)
        # In a full ring the oldest record stands at the cursor; before that, at 0.
        oldest = self.cursor if storage._is_full else 0
        start = draw // envs + oldest
        time = (start[:, None] + torch.arange(self.length, device=device)) % filled
        env = (draw % envs)[:, None].expand_as(time)
        self.last_index = (time.flatten(), env.flatten())
        return self.last_index, {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())

    def _empty(self) -> None:
        self.cursor = 0

    def dumps(self, path: Any) -> None:
        raise NotImplementedError("saved through state_dict (checkpoint.py)")

    def loads(self, path: Any) -> None:
        raise NotImplementedError("loaded through load_state_dict (checkpoint.py)")


def record_bytes(observation: int, action: int, model: ModelConfig) -> int:
    """Bytes of one stored record."""
    floats = observation + action + 1 + model.belief
    state = 4 * model.gaussian if model.latent == "gaussian" else model.categoricals
    return 4 * floats + 3 + state + 12  # three flags, the version and the serial number


class Replay:
    """The ring buffer.

    Args:
        envs: training envs. generator: on `device`, draws the slices.
        observation, action: O, A.
    """

    def __init__(
        self,
        cfg: ReplayConfig,
        envs: int,
        observation: int,
        action: int,
        model: ModelConfig,
        device: torch.device,
        generator: torch.Generator,
    ):
        self.cfg, self.envs, self.device = cfg, envs, device
        self.steps = cfg.size // envs
        """Capacity in time steps; each holds a record of every env."""
        self.gib = self.steps * envs * record_bytes(observation, action, model) / 2**30
        self.slices = cfg.batch_size // cfg.batch_length
        self.sampler = RingSliceSampler(cfg.batch_length + 1, generator)
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(self.steps * envs, ndim=2, device=device),
            sampler=self.sampler,
            batch_size=self.slices * (cfg.batch_length + 1),
        )
        self.written = 0
        """Time steps written so far; `serial` of the next record."""

    def describe(self) -> str:
        """Capacity in words, for the start of a run."""
        return (
            f"replay: {self.steps * self.envs:,} records ({self.steps:,} steps of {self.envs} envs)"
            f", {self.gib:.2f} GiB on {self.device}"
        )

    def check_memory(self) -> None:
        """Refuse a buffer that cannot fit.

        Raises:
            ValueError: naming the sizes and the remedy.
        """
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0] / 2**30
        else:
            free = _available_memory() / 2**30
        if self.gib > 0.9 * free:
            fits = int(self.cfg.size * 0.8 * free / self.gib)
            raise ValueError(
                f"replay_buffer.size={self.cfg.size} needs {self.gib:.2f} GiB on {self.device}, of "
                f"which {free:.2f} GiB are free. Remedy: replay_buffer.size={fits} or less."
            )

    def __len__(self) -> int:
        return min(self.written, self.steps) * self.envs

    @property
    def ready(self) -> bool:
        """Whether one slice can be drawn."""
        return min(self.written, self.steps) >= self.sampler.length

    def extend(self, records: TensorDictBase) -> None:
        """Write records [env, time]; the oldest are overwritten when the ring is full."""
        envs, steps = records.shape
        if envs != self.envs:
            raise ValueError(f"records of {envs} envs for a buffer of {self.envs}")
        serial = torch.arange(self.written, self.written + steps, device=self.device)
        records = records.to(self.device)
        self.buffer.extend(records.set("serial", serial.expand(envs, steps)))
        self.written += steps
        self.sampler.cursor = self.written % self.steps

    def sample(self) -> TensorDict:
        """A batch [B, T+1] of consecutive records (see `learner`)."""
        batch = self.buffer.sample()
        return batch.reshape(self.slices, self.sampler.length)

    def refresh(self, batch: TensorDictBase, latents: TensorDictBase) -> None:
        """Write the latents of steps 1..T of the batch sampled last back to its records.

        Args:
            batch: as `sample` returned it. latents: [B, T] belief and state.

        A record that has been overwritten since is left alone: its serial number differs.
        """
        assert self.sampler.last_index is not None
        shape = (self.slices, self.sampler.length)
        time, env = (i.view(shape)[:, 1:] for i in self.sampler.last_index)
        storage = self._tensors()
        same = storage["serial"][time, env] == batch["serial"][:, 1:]
        for name, new in latents.items():
            old = storage[name][time, env]
            mask = same.unsqueeze(-1)
            storage[name][time, env] = torch.where(mask, new.to(old.dtype), old)

    def _tensors(self) -> TensorDictBase:
        storage: Any = self.buffer.storage
        return storage._storage

    def state_dict(self) -> dict[str, Any]:
        """Contents, cursor and sampler state."""
        filled = min(self.written, self.steps)
        data = {}
        if filled:
            data = {k: v[:filled].clone() for k, v in self._tensors().items()}
        return {"data": data, "written": self.written, "sampler": self.sampler.state_dict(),
                "envs": self.envs, "steps": self.steps}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill an empty buffer with saved contents.

        Raises:
            ValueError: when the buffer has another size.
        """
        if (state["envs"], state["steps"]) != (self.envs, self.steps):
            raise ValueError(
                f"the saved replay buffer has {state['steps']} steps of {state['envs']} envs, this "
                f"one {self.steps} of {self.envs}. Remedy: the same replay_buffer.size and env."
                "num_envs as the saved run."
            )
        self.sampler.load_state_dict(state["sampler"])
        if not state["data"]:
            return
        filled = len(state["data"]["serial"])
        data = TensorDict(state["data"], [filled, self.envs]).transpose(0, 1)
        self.buffer.extend(data.to(self.device).contiguous())
        writer: Any = self.buffer.writer
        writer._cursor = state["written"] % self.steps
        self.written = state["written"]
        self.sampler.cursor = self.written % self.steps


def _available_memory() -> float:
    """Bytes of main memory that can still be used."""
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")
