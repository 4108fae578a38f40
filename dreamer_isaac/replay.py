"""Replay: TorchRL's `LazyTensorStorage` as a ring over time, with our own slice sampler.

Only one thread may touch it (the learner's): concurrent `extend` and `sample` on CUDA storage race
across streams (TorchRL issue 3463).

The storage is [time, env]; batches come in as [env, time], which `ReplayBuffer` transposes for
`ndim=2`. A slice is T+1 consecutive records of one env, drawn uniformly over every (env, start)
whose slice lies wholly in the written part of the ring. It may cross episode ends (`is_first`
marks them), so that episodes shorter than a slice are trained too, which TorchRL's `SliceSampler`
never does; it never crosses the write head. So the newest T records are drawn less often than the
others, the very newest almost never (the reference trains new sequences first, from a queue).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from dreamer_isaac.config import ModelConfig, ReplayConfig
from dreamer_isaac.optim import set_generator


class RingSliceSampler(Sampler):
    """Uniform over (env, start). Only enqueues work: how much is stored and where the oldest record
    stands are numbers on the device, so that drawing can be part of a captured CUDA graph.

    Args:
        length: records of a slice, T+1. steps: capacity of the ring. envs: its width.
        generator: draws the indices, on the storage's device.
    """

    def __init__(self, length: int, steps: int, envs: int, generator: torch.Generator):
        self.length, self.steps, self.envs, self.generator = length, steps, envs, generator
        device = generator.device
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        self.oldest = torch.zeros((), dtype=torch.int64, device=device)
        self._ahead = torch.arange(length, device=device)

    def advance(self, written: int) -> None:
        """Note that `written` time steps have been written in all."""
        self.filled.fill_(min(written, self.steps))
        self.oldest.fill_(written % self.steps if written > self.steps else 0)

    def draw(self, slices: int) -> tuple[Tensor, Tensor]:
        """Indices (time, env), [slices, T+1] each; at least one slice must be stored."""
        starts = (self.filled - self.length + 1) * self.envs
        place = torch.rand(
            slices, dtype=torch.float64, generator=self.generator, device=self.generator.device
        )
        place = (place * starts).long()
        start = place // self.envs + self.oldest
        time = (start[:, None] + self._ahead) % self.steps
        return time, (place % self.envs)[:, None].expand_as(time)

    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict]:
        """TorchRL's interface: indices of `batch_size` records, slice after slice.

        Raises:
            ValueError: when fewer than T+1 steps are stored.
        """
        if storage.shape[0] < self.length:
            raise ValueError(f"{storage.shape[0]} steps are stored, a slice needs {self.length}.")
        time, env = self.draw(batch_size // self.length)
        return (time.flatten(), env.flatten()), {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_generator(self.generator, state["generator"])

    def _empty(self) -> None:
        self.advance(0)

    def dumps(self, path: Any) -> None:
        raise NotImplementedError("saved through state_dict (checkpoint.py)")

    def loads(self, path: Any) -> None:
        raise NotImplementedError("loaded through load_state_dict (checkpoint.py)")


def record_bytes(
    observation: int, action: int, model: ModelConfig, pixels: tuple[int, int, int] | None = None
) -> int:
    """Bytes of one stored record."""
    floats = observation + action + 1 + model.belief
    state = 4 * model.gaussian if model.latent == "gaussian" else model.categoricals
    picture = math.prod(pixels) if pixels else 0
    return 4 * floats + 3 + state + 12 + picture  # 12: the version and the serial number


class Replay:
    """The ring buffer.

    Args:
        envs: training envs. generator: on `device`, draws the slices.
        observation, action: O, A. pixels: shape of the pictures, where there are any.
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
        pixels: tuple[int, int, int] | None = None,
    ):
        self.cfg, self.envs, self.device = cfg, envs, device
        self.steps = cfg.size // envs
        """Capacity in time steps; each holds a record of every env."""
        record = record_bytes(observation, action, model, pixels)
        self.gib = self.steps * envs * (record + 4) / 2**30
        self.slices = cfg.batch_size // cfg.batch_length
        self.sampler = RingSliceSampler(cfg.batch_length + 1, self.steps, envs, generator)
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(self.steps * envs, ndim=2, device=device),
            sampler=self.sampler,
            batch_size=self.slices * (cfg.batch_length + 1),
        )
        self._index: tuple[Tensor, Tensor] | None = None
        """Of the batch sampled last."""
        self._writer: Tensor | None = None
        """[steps * envs] int32, room for `_writers`; made with the first records."""
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
        self._make_room()
        serial = torch.arange(self.written, self.written + steps, device=self.device)
        # Asynchronous copies would be waited for on the current device, not where they are made.
        records = records.to(self.device, non_blocking=False)
        self.buffer.extend(records.set("serial", serial.expand(envs, steps)))
        self.written += steps
        self.sampler.advance(self.written)

    @property
    def generators(self) -> list[torch.Generator]:
        """What `sample` draws from; a CUDA graph that contains it must know."""
        return [self.sampler.generator]

    def sample(self) -> TensorDict:
        """T+1 consecutive records of B envs: every field [B, T+1, ...], but of the latents the
        first record's, [B, ...] (see `learner`). Only enqueues work.

        Raises:
            ValueError: when less than one slice is stored.
        """
        if not self.ready:
            raise ValueError(f"{self.written} steps are stored, a slice needs "
                             f"{self.sampler.length}.")  # fmt: skip
        self._index = self.sampler.draw(self.slices)
        time, env = self._index
        first = time[:, 0], env[:, 0]
        fields = {
            name: stored[first if name in ("belief", "state") else self._index]
            for name, stored in self._tensors().items()
        }
        return TensorDict(fields, [self.slices])

    def refresh(self, batch: TensorDictBase, latents: TensorDictBase) -> None:
        """Write the latents of steps 1..T of the batch sampled last back to its records.

        Args:
            batch: as `sample` returned it. latents: [B, T] belief and state.

        A record that has been overwritten since is left alone: its serial number differs. Where
        slices overlap, the last one's latents are kept, belief and state of the same one.
        """
        assert self._index is not None, "sample() comes first"
        time, env = (i[:, 1:] for i in self._index)
        storage = self._tensors()
        same = storage["serial"][time, env] == batch["serial"][:, 1:]
        writer = self._writers(time * self.envs + env)
        for name, new in latents.items():
            new = new.flatten(0, 1)[writer].view_as(new)
            old = storage[name][time, env]
            mask = same.unsqueeze(-1)
            storage[name][time, env] = torch.where(mask, new.to(old.dtype), old)

    def _make_room(self) -> None:
        if self._writer is None:
            places = self.steps * self.envs
            self._writer = torch.zeros(places, dtype=torch.int32, device=self.device)

    def _writers(self, places: Tensor) -> Tensor:
        """For each of n places in the ring, the last of the n that is the same. Writing to one
        place twice leaves open which value stays, even for parts of one vector."""
        assert self._writer is not None
        places = places.flatten()
        self._writer.index_fill_(0, places, -1)
        order = torch.arange(len(places), dtype=torch.int32, device=places.device)
        self._writer.scatter_reduce_(0, places, order, "amax")
        return self._writer[places].long()

    def _tensors(self) -> TensorDictBase:
        storage: Any = self.buffer.storage
        return storage._storage

    def state_dict(self) -> dict[str, Any]:
        """Contents, cursor and sampler state. To be used before the next `extend` or `refresh`: a
        full ring is not copied where it is in main memory, and never on the GPU, which may have
        no room for it."""
        filled = min(self.written, self.steps)
        data = {}
        if filled:
            data = {k: v[:filled].cpu() for k, v in self._tensors().items()}
        if filled < self.steps and self.device.type == "cpu":  # a view would be saved as a whole
            data = {k: v.clone() for k, v in data.items()}
        return {"data": data, "written": self.written, "sampler": self.sampler.state_dict(),
                "envs": self.envs, "steps": self.steps}  # fmt: skip

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse contents that this buffer cannot take.

        Raises:
            ValueError: when the buffer has another size.
        """
        if (state["envs"], state["steps"]) != (self.envs, self.steps):
            raise ValueError(
                f"the saved replay buffer has {state['steps']} steps of {state['envs']} envs, this "
                f"one {self.steps} of {self.envs}. Remedy: the same replay_buffer.size and env."
                "num_envs as the saved run."
            )

    def load_state_dict(self, state: dict[str, Any], chunk: int = 64) -> None:
        """Fill an empty buffer with saved contents, `chunk` time steps at once.

        Raises:
            ValueError: when the buffer has another size.
        """
        self.check_state(state)
        self.sampler.load_state_dict(state["sampler"])
        if not state["data"]:
            return
        self._make_room()
        filled = len(state["data"]["serial"])
        data = TensorDict(state["data"], [filled, self.envs])
        for begin in range(0, filled, chunk):
            part = data[begin : begin + chunk].transpose(0, 1)
            self.buffer.extend(part.to(self.device, non_blocking=False).contiguous())
        writer: Any = self.buffer.writer
        writer._cursor = state["written"] % self.steps
        self.written = state["written"]
        self.sampler.advance(self.written)


def _available_memory() -> float:
    """Bytes of main memory that can still be used."""
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")
