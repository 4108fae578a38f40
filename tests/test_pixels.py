"""Pictures from the simulator to the replay buffer, the networks and the reports. (That a run from
pixels resumes exactly stands in test_train.)"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_that_nothing_changes_later

from dreamer_isaac.cameras import POSES, Pose, poses
from dreamer_isaac.collect import Setup, Sync, Thread
from dreamer_isaac.config import AlgoConfig, ModelConfig, ReplayConfig
from dreamer_isaac.envs.toy import ToyEnv
from dreamer_isaac.evaluate import enlarged, side_by_side
from dreamer_isaac.models import Agent
from dreamer_isaac.models.heads import ImageDecoder
from dreamer_isaac.optim import flatten
from dreamer_isaac.replay import Replay, record_bytes

MODEL = ModelConfig(
    belief=8, hidden=4, categoricals=2, classes=3, blocks=2, units=4, encoder_layers=1,
    decoder_layers=1, actor_layers=1, critic_layers=1, bins=9, cnn_depth=2,
)  # fmt: skip


def position(pixels: torch.Tensor) -> torch.Tensor:
    """Where the toy's bright column is: [..., H, W, 3] -> [...]."""
    weight = pixels[..., 0, :, 0].double()
    columns = torch.linspace(-2, 2, weight.shape[-1], dtype=torch.float64)
    return (weight * columns).sum(-1) / weight.sum(-1)


# -- poses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pose", [*POSES.values(), Pose((-7, 0, 3), (-6, 0, 2.8)),
                                  Pose((1, 2, 3), (4, -5, -6)), Pose((0, 0, -1), (0, 0, 5)),
                                  Pose((2, 0, 0), (0, 0, 0))])  # fmt: skip
def test_a_camera_looks_at_its_target_with_the_horizon_level(pose: Pose) -> None:
    right, up, back = (torch.tensor(v, dtype=torch.float64) for v in pose.frame())
    towards = torch.tensor(pose.target).double() - torch.tensor(pose.position).double()
    assert torch.allclose(-back, towards / towards.norm(), atol=1e-12)
    matrix = torch.stack([right, up, back], 1)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(matrix.T @ matrix, eye, atol=1e-12, rtol=0)
    assert torch.linalg.det(matrix) > 0
    assert abs(right[2]) < 1e-12 and up[2] >= -1e-12
    w, x, y, z = pose.quaternion()
    assert math.isclose(w * w + x * x + y * y + z * z, 1)
    turned = torch.tensor([  # the rotation matrix of (w, x, y, z)
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(turned, matrix, atol=1e-9, rtol=0)


def test_every_mistake_in_a_camera_is_named() -> None:
    with pytest.raises(ValueError, match="named poses are") as e:
        poses({"a": "front", "b": {"position": [0, 0, 1], "target": [0, 0, 1]},
               "c": {"position": [1, 0, 1], "target": [0, 0, 1], "fov": 400}})  # fmt: skip
    assert [line.split(":")[0] for line in str(e.value).splitlines()] == [
        "env.cameras.a=front", "env.cameras.b", "env.cameras.c.fov=400",
    ]  # fmt: skip
    got = poses({"mine": {"position": [1, 2, 3], "target": [0, 0, 0], "fov": 30}, "top": "top"})
    assert got == {"mine": Pose((1, 2, 3), (0, 0, 0), 30.0), "top": POSES["top"]}


# -- from the simulator to the buffer ------------------------------------------------------------


def test_nothing_that_is_handed_out_changes_later() -> None:
    actions = [torch.full((4, 1), 0.1 * step) for step in range(50)]
    check_that_nothing_changes_later(ToyEnv(4, 0, image=16, pixels_only=False), actions)


@pytest.mark.parametrize("kind", ["sync", "thread"])
def test_a_record_has_the_picture_of_its_own_step(kind: str) -> None:
    """The toy writes its picture in place, as simulators do: the last one must not stand in for
    all of a batch."""
    torch.manual_seed(0)
    env = ToyEnv(6, 0, image=32, pixels_only=False)
    agent = Agent(3, 1, MODEL, AlgoConfig(), env.info.pixels)
    replay = Replay(
        ReplayConfig(400, 24, 4),
        6,
        3,
        1,
        MODEL,
        torch.device("cpu"),
        torch.Generator(),
        (32, 32, 3),
    )
    setup = Setup(env, agent, replay.extend, torch.Generator().manual_seed(1), 10, 10**9)
    cpu = torch.device("cpu")
    weights = flatten(agent.parameters())
    collector = Sync(setup) if kind == "sync" else Thread(setup, weights, cpu, 360)
    with collector:
        while len(replay) < 300:
            collector.step()
    batch = replay.sample()
    assert batch["pixels"].shape == (6, 5, 32, 32, 3) and batch["pixels"].dtype == torch.uint8
    torch.testing.assert_close(
        position(batch["pixels"]), batch["obs"][..., 0].double(), atol=0.02, rtol=0
    )
    assert batch["obs"][..., 0].std() > 0.1  # they do differ


def test_a_record_is_as_large_as_it_says() -> None:
    shape = (16, 16, 6)
    replay = Replay(ReplayConfig(64, 8, 4), 2, 0, 1, MODEL, torch.device("cpu"),
                    torch.Generator(), shape)  # fmt: skip
    env = ToyEnv(2, 0, image=16)
    agent = Agent(0, 1, MODEL, AlgoConfig(), env.info.pixels)

    def keep(records: Any) -> None:
        pictures = records["pixels"].repeat(1, 1, 1, 1, 2)
        replay.extend(records.set("pixels", pictures))

    with Sync(Setup(env, agent, keep, torch.Generator(), 8, 10**9)) as collector:
        collector.step()
    stored = replay._tensors()
    measured = sum(v.element_size() * v[0, 0].numel() for v in stored.values())
    assert measured == record_bytes(0, 1, MODEL, shape)


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", [0, 3])
@pytest.mark.parametrize("latent", ["categorical", "gaussian"])
def test_networks_see_pictures_and_predict_them(latent: str, observation: int) -> None:
    torch.manual_seed(0)
    side = 64 if latent == "gaussian" else 32
    model = ModelConfig(**{**vars(MODEL), "latent": latent, "gaussian": 4})
    name = "dreamer_v1" if latent == "gaussian" else "dreamer_v3"
    agent = Agent(observation, 2, model, AlgoConfig(name=name), (side, side, 6))
    obs = torch.randn(5, 7, observation)
    pixels = torch.randint(0, 256, (5, 7, side, side, 6), dtype=torch.uint8)
    embedding = agent.encoder(obs, pixels)
    assert embedding.shape == (5, 7, agent.encoder.width)
    assert not torch.equal(embedding, agent.encoder(obs, 255 - pixels))
    features = torch.randn(5, 7, agent.features)
    decoded = agent.decoder(features)
    loss = agent.decoder.loss(decoded, obs, pixels)
    # By hand, in float64, one pixel after the other.
    picture = decoded[0].double().permute(0, 1, 3, 4, 2)
    by_hand = (picture - pixels.double() / 255).pow(2).sum((2, 3, 4))
    if observation:
        by_hand = by_hand + agent.decoder.vector.loss(decoded[1], obs).double()
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-5, atol=0)
    assert agent.decoder.decode(features).shape == (5, 7, observation)
    shown = agent.decoder.decode_pixels(features)
    assert shown.shape == pixels.shape and shown.min() >= 0 and shown.max() <= 1


def test_pictures_for_people() -> None:
    two = torch.zeros(16, 16, 6, dtype=torch.uint8)
    two[..., 3:] = 200
    big = enlarged(two)
    assert big.shape == (256, 512, 3)
    assert big[:, :256].max() == 0 and big[:, 256:].min() == 200
    real = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    frames = side_by_side(real, torch.full((2, 16, 16, 3), 110 / 255))
    third = len(frames[0]) // 3
    assert [int(frames[0][i * third].max()) for i in range(3)] == [100, 110, 10]


# -- the whole program ---------------------------------------------------------------------------

PIXELS = ["env.from_pixels=true", "env.image_size=16", "model.cnn_depth=2"]


def test_reports_of_a_run_from_pixels(
    program: Callable[..., subprocess.CompletedProcess[str]], toy_overrides: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    done = program(*toy_overrides, *PIXELS, "evaluation.video=true", "env.pixels_only=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "observation 3 and pictures of 16 x 16 x 3" in done.stdout
    run = tmp_path / "run"
    for name in ("videos/policy_view.mp4", "videos/open_loop.mp4", "plots/open_loop.png",
                 "plots/open_loop_pixels.png"):  # fmt: skip
        assert (run / name).stat().st_size > 500, name
    other = program(*toy_overrides[:-1], "mode=evaluate", f"checkpoint={run}")
    assert other.returncode == 0, other.stdout + other.stderr
    assert "observation 3 and pictures of 16 x 16 x 3" in other.stdout  # as it was trained


def test_widths_that_blocks_do_not_divide() -> None:
    assert ImageDecoder(32, (16, 16, 3), depth=3, blocks=8)(torch.zeros(2, 32)).shape == (
        2,
        3,
        16,
        16,
    )
