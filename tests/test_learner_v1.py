"""Dreamer V1 against TorchRL's public losses in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl_learners import v1_losses

from dreamer_isaac.config import AlgoConfig, ModelConfig, OptimizationConfig
from dreamer_isaac.learner_v1 import LearnerV1
from dreamer_isaac.models import Agent
from dreamer_isaac.models.heads import TanhActor
from dreamer_isaac.optim import GroupAdam

B, T, O, A, H = 3, 5, 6, 2, 4
MODEL = ModelConfig(
    size="v1", latent="gaussian", gaussian=3, belief=8, hidden=8, units=10, encoder_layers=2,
    decoder_layers=2, head_layers=2, actor_layers=2, critic_layers=2,
)  # fmt: skip
ALGO = AlgoConfig(name="dreamer_v1", horizon=H, discount_horizon=100, free_nats=0.5)
S, D = MODEL.gaussian, MODEL.belief


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_learner() -> LearnerV1:
    torch.manual_seed(0)
    agent = Agent(O, A, MODEL, ALGO)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return LearnerV1(agent, ALGO, OptimizationConfig(), torch.Generator().manual_seed(1))


def make_batch(seed: int = 0) -> TensorDict:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    flags = torch.zeros(B, T + 1, dtype=torch.bool)
    return TensorDict(
        obs=draw(B, T + 1, O), action=draw(B, T + 1, A).clamp(-1, 1), reward=draw(B, T + 1),
        is_first=flags.clone(), terminated=flags.clone(), truncated=flags.clone(),
        belief=draw(B, D), state=draw(B, S), batch_size=[B],
    )  # fmt: skip


def test_losses_and_gradients_equal_torchrl(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, batch = make_learner(), make_batch()
    agent, noise = learner.agent, learner.draw_noise(B, T)
    names = list(learner.params)
    losses, _, observed = learner.losses(batch, noise)
    kinds = {"reconstruction": "model", "reward": "model", "kl": "model", "actor": "actor",
             "critic": "critic"}  # fmt: skip
    gradients = {
        k: dict(zip(names, torch.autograd.grad(
            v, list(learner.params.values()), retain_graph=True, allow_unused=True), strict=True))
        for k, v in losses.items()
    }  # fmt: skip

    monkeypatch.setattr(Tensor, "float", lambda self: self.to(torch.float64))
    model_loss, actor_loss, value_loss = v1_losses(agent, MODEL, ALGO)
    # Draws: a prior (discarded) and a posterior one per observed step, then H imagined ones.
    queue: list[Tensor] = []
    for t in range(T):
        queue += [torch.zeros(B, S), noise.posterior[t]]
    queue += list(noise.prior)
    draws = iter(queue)
    monkeypatch.setattr(torch, "randn_like", lambda *_: next(draws))
    sample = TensorDict(
        state=batch["state"].unsqueeze(1).expand(-1, T, -1),
        belief=batch["belief"].unsqueeze(1).expand(-1, T, -1),
        action=batch["action"][:, :-1],
        next=TensorDict(
            vector=batch["obs"][:, 1:], pixels=batch["obs"][:, 1:].reshape(B, T, 1, 1, O),
            reward=batch["reward"][:, :-1].unsqueeze(-1), batch_size=[B, T],
        ),
        batch_size=[B, T],
    )  # fmt: skip
    result, seen = model_loss(sample)
    torch.testing.assert_close(seen["next", "belief"], observed.belief.detach())
    torch.testing.assert_close(seen["next", "state"], observed.state.detach())

    normals = iter(noise.action)
    monkeypatch.setattr(
        torch.distributions.normal, "_standard_normal", lambda *_, **__: next(normals)
    )
    start = TensorDict(
        state=observed.state.detach().flatten(0, 1), belief=observed.belief.detach().flatten(0, 1),
        batch_size=[B * T],
    )  # fmt: skip
    actor_result, fake = actor_loss(start)
    value_result, _ = value_loss(fake)

    theirs = {
        "reconstruction": result["loss_model_reco"].sum(), "kl": result["loss_model_kl"].sum(),
        "reward": result["loss_model_reward"].sum(), "actor": actor_result["loss_actor"],
        "critic": value_result["loss_value"],
    }  # fmt: skip
    own = list(learner.params.values())
    checked = 0
    for name, mine in losses.items():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-6, atol=1e-6, msg=name)
        inputs = own
        if kinds[name] == "critic":  # TorchRL's loss holds copies of the critic's parameters
            copies = [p for p in value_loss.parameters() if all(p is not q for q in own)]
            inputs = own + copies
        grads = torch.autograd.grad(theirs[name], inputs, retain_graph=True, allow_unused=True)
        for key, other in zip(names, grads, strict=False):
            mine_g = gradients[name][key]
            if kinds[name] == "actor" and not key.startswith("actor"):
                assert mine_g is None  # TorchRL leaves gradients there and does not apply them
                continue
            zero = torch.zeros_like(learner.params[key])
            a, b = (zero if g is None else g for g in (mine_g, other))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")
            checked += bool(a.any())
    assert checked > 30


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_update_applies_exactly_these_gradients(scale: float) -> None:
    learner, batch = make_learner(), make_batch()
    learner.algo = dataclasses.replace(ALGO, actor_scale=scale, critic_scale=3 * scale)
    state = learner.generator.get_state()
    noise = learner.draw_noise(B, T)
    losses, _, _ = learner.losses(batch, noise)
    weighted = sum(learner.scales()[k] * v for k, v in losses.items())
    assert isinstance(weighted, Tensor)
    expected = torch.autograd.grad(weighted, list(learner.params.values()))
    learner.generator.set_state(state)
    metrics, latents = learner.update(batch)
    for (name, p), g in zip(learner.params.items(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, msg=name)
        assert p.grad is not None and not p.grad.requires_grad  # no graph is kept alive
    torch.testing.assert_close(metrics["loss/total"], weighted.detach())
    assert latents["state"].shape == (B, T, S) and latents["belief"].shape == (B, T, D)


def test_the_model_learns_and_the_actor_climbs() -> None:
    torch.set_default_dtype(torch.float32)
    learner, batch = make_learner(), make_batch()
    assert isinstance(learner.optimizer, GroupAdam)
    learner.optimizer.warmup = 0
    for group, rate, name in ((0, 1e-3, "loss/reconstruction"), (1, 3e-3, "loss/actor")):
        learner.optimizer.lrs.zero_()  # one group at a time: what it climbs stands still
        learner.optimizer.lrs[group] = rate
        losses = torch.stack([learner.update(batch)[0][name] for _ in range(200)])
        spread = losses[:10].std()
        assert losses[-10:].mean() < losses[:10].mean() - 2 * spread - 0.02, name
    learner.check_finite()


def test_group_adam_equals_torch() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    values = [torch.randn(4, 3), torch.randn(5), torch.randn(7)]
    mine = {str(i): nn.Parameter(v.clone()) for i, v in enumerate(values)}
    theirs = [nn.Parameter(v.clone()) for v in values]
    ours = GroupAdam(mine, [0, 0, 1], [1e-2, 3e-3], clip=1.0)
    others = [torch.optim.Adam(theirs[:2], lr=1e-2), torch.optim.Adam(theirs[2:], lr=3e-3)]
    for _ in range(8):
        for p, q in zip(mine.values(), theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        nn.utils.clip_grad_norm_(theirs[:2], 1.0)
        nn.utils.clip_grad_norm_(theirs[2:], 1.0)
        for other in others:
            other.step()
    for p, q in zip(mine.values(), theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_saturated_actor_can_come_back() -> None:
    """Its mean is bounded before the tanh as in the paper's code; 20 had no gradient."""
    actor = TanhActor(1, 1, 4, 1).double()
    last = [m for m in actor.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([20.0, 0.0]))
    mean, std = actor(torch.ones(3, 1, dtype=torch.float64))
    assert (mean < 5).all() and std.allclose(torch.full_like(std, 5.0))
    actor.mode(mean).sum().backward()
    assert last.bias.grad is not None and last.bias.grad[0] > 1e-7
