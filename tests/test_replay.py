"""The ring buffer with identifiable data: record (env e, step t) carries 1000 e + t."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from dreamer_isaac.config import ModelConfig, ReplayConfig
from dreamer_isaac.replay import Replay

ENVS, LENGTH = 3, 4
MODEL = ModelConfig(belief=2, categoricals=2, classes=3)


def make(steps: int = 20, slices: int = 8) -> Replay:
    cfg = ReplayConfig(size=steps * ENVS, batch_size=slices * LENGTH, batch_length=LENGTH)
    generator = torch.Generator().manual_seed(0)
    return Replay(cfg, ENVS, 1, 1, MODEL, torch.device("cpu"), generator)


def records(start: int, count: int) -> TensorDict:
    mark = 1000.0 * torch.arange(ENVS)[:, None] + torch.arange(start, start + count)
    return TensorDict(
        obs=mark.unsqueeze(-1), belief=torch.zeros(ENVS, count, 2),
        state=torch.zeros(ENVS, count, 2, dtype=torch.uint8), batch_size=[ENVS, count],
    )  # fmt: skip


def fill(replay: Replay, total: int, chunk: int) -> None:
    for start in range(0, total, chunk):
        replay.extend(records(start, min(chunk, total - start)))


@pytest.mark.parametrize(("total", "chunk"), [(7, 7), (20, 5), (33, 3), (50, 7), (61, 20)])
def test_slices_are_consecutive_and_every_start_is_reachable(total: int, chunk: int) -> None:
    replay = make()
    fill(replay, total, chunk)
    oldest = max(0, total - 20)
    starts = set()
    for _ in range(150):
        batch = replay.sample()
        assert batch["obs"].shape == (8, LENGTH + 1, 1) and batch["belief"].shape == (8, 2)
        mark = batch["obs"].squeeze(-1)
        assert torch.equal(mark[:, 1:], mark[:, :-1] + 1)  # one env, no write head in between
        starts |= {(int(m) // 1000, int(m) % 1000) for m in mark[:, 0]}
    expected = {(e, t) for e in range(ENVS) for t in range(oldest, total - LENGTH)}
    assert starts == expected


def test_latents_return_to_their_records() -> None:
    replay = make()
    fill(replay, 33, 3)
    batch = replay.sample()
    new = batch["obs"][:, 1:]
    latents = TensorDict(
        belief=new.expand(-1, -1, 2).clone(),
        state=torch.full((8, LENGTH, 2), 2, dtype=torch.uint8), batch_size=[8, LENGTH],
    )  # fmt: skip
    replay.refresh(batch, latents)
    refreshed = {int(x) for x in new.flatten()}
    stored = replay._tensors()
    for t in range(20):
        for e in range(ENVS):
            mark = int(stored["obs"][t, e, 0])
            expected = float(mark) if mark in refreshed else 0.0
            assert stored["belief"][t, e].tolist() == [expected, expected]
            assert stored["state"][t, e].tolist() == ([2, 2] if mark in refreshed else [0, 0])


def test_where_slices_overlap_one_writes_the_whole_record() -> None:
    """Writers of the same place raced, with more than one thread: runs were not repeatable, and a
    record could get one slice's belief and another's state. (Small tensors are copied by one.)"""
    threads, width = torch.get_num_threads(), 256
    cfg = ReplayConfig(size=12 * ENVS, batch_size=64 * LENGTH, batch_length=LENGTH)
    model = ModelConfig(belief=width, categoricals=2, classes=3)
    replay = Replay(cfg, ENVS, 1, 1, model, torch.device("cpu"), torch.Generator().manual_seed(0))
    full = records(0, 12).set("belief", torch.zeros(ENVS, 12, width))
    replay.extend(full)
    batch = replay.sample()
    writer = torch.arange(64 * LENGTH).view(64, LENGTH, 1)
    latents = TensorDict(
        belief=writer.expand(-1, -1, width).float(), batch_size=[64, LENGTH],
        state=(writer % 251).expand(-1, -1, 2).to(torch.uint8),
    )  # fmt: skip
    last = {int(m): i for i, m in enumerate(batch["obs"][:, 1:].flatten())}
    try:
        torch.set_num_threads(2)
        for _ in range(20):
            replay._tensors()["belief"].zero_()
            replay.refresh(batch, latents)
            for mark, i in last.items():
                record = replay._tensors()[mark % 1000, mark // 1000]
                assert (record["belief"] == i).all() and (record["state"] == i % 251).all()
    finally:
        torch.set_num_threads(threads)


def test_overwritten_records_are_not_refreshed() -> None:
    replay = make()
    fill(replay, 20, 20)
    batch = replay.sample()
    fill_again = records(20, 20)
    replay.extend(fill_again)  # every sampled record is gone now
    latents = TensorDict(
        belief=torch.ones(8, LENGTH, 2), batch_size=[8, LENGTH],
        state=torch.ones(8, LENGTH, 2, dtype=torch.uint8),
    )  # fmt: skip
    replay.refresh(batch, latents)
    assert not replay._tensors()["belief"].any()


@pytest.mark.parametrize("total", [9, 33])
def test_state_goes_into_a_new_buffer(total: int) -> None:
    replay, other = make(), make()
    fill(replay, total, 3)
    replay.sample()
    state = replay.state_dict()
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in state["data"].values())
    other.load_state_dict(state, chunk=4)  # neither 9 nor 20 is a multiple
    for _ in range(3):
        assert torch.equal(replay.sample()["obs"], other.sample()["obs"])
        more = records(replay.written, 3)
        replay.extend(more.clone())
        other.extend(more.clone())
    with pytest.raises(ValueError, match=r"replay_buffer\.size"):
        make(30).load_state_dict(replay.state_dict())


def test_too_little_data_and_too_much_memory_are_refused() -> None:
    replay = make()
    assert not replay.ready
    replay.extend(records(0, LENGTH))
    assert not replay.ready
    with pytest.raises(ValueError, match="a slice needs"):
        replay.sample()
    replay.extend(records(LENGTH, 1))
    assert replay.ready and len(replay) == ENVS * (LENGTH + 1)
    huge = make(steps=10**12)
    with pytest.raises(ValueError, match=r"GiB.*Remedy"):
        huge.check_memory()
