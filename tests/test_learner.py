"""The update against TorchRL's public loss in float64, and against hand-computed reset rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrl.modules.models.model_based as torchrl_models
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl_learners import v3_loss

from dreamer_isaac.config import AlgoConfig, ModelConfig, OptimizationConfig
from dreamer_isaac.learner import Learner, Noise, NonFiniteError, lambda_return
from dreamer_isaac.models import Agent
from dreamer_isaac.optim import LossScale

B, T, O, A, H = 3, 5, 6, 2, 4
MODEL = ModelConfig(
    size="tiny", belief=16, hidden=8, categoricals=3, classes=4, blocks=2, units=10,
    encoder_layers=2, decoder_layers=2, actor_layers=2, critic_layers=2, bins=21,
)  # fmt: skip
ALGO = AlgoConfig(horizon=H)
S, K, D = MODEL.categoricals, MODEL.classes, MODEL.belief


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """float64 throughout. TorchRL's RMS norm computes in float32 whatever it is given, which would
    hide everything below 1e-7; here it keeps the dtype (in our heads too, which are TorchRL's)."""
    monkeypatch.setattr(
        torchrl_models, "_dreamer_v3_rms_norm",
        lambda x, weight, eps: nn.functional.rms_norm(x, (len(weight),), weight, eps),
    )  # fmt: skip
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_learner(**algo: Any) -> Learner:
    torch.manual_seed(0)
    agent = Agent(O, A, MODEL, AlgoConfig(**({"horizon": H} | algo)))
    with torch.no_grad():  # heads start at zero and would hide their own gradients
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return Learner(agent, agent_algo(algo), OptimizationConfig(), torch.Generator().manual_seed(1))


def agent_algo(algo: dict[str, Any]) -> AlgoConfig:
    return AlgoConfig(**({"horizon": H} | algo))


def make_batch(seed: int = 0) -> TensorDict:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    flags = torch.zeros(B, T + 1, dtype=torch.bool)
    return TensorDict(
        obs=3 * draw(B, T + 1, O), action=draw(B, T + 1, A).clamp(-1, 1), reward=draw(B, T + 1),
        is_first=flags.clone(), terminated=flags.clone(), truncated=flags.clone(),
        belief=draw(B, D), batch_size=[B],
        state=torch.randint(K, (B, S), generator=g, dtype=torch.uint8),
    )  # fmt: skip


# -- against TorchRL ---------------------------------------------------------------------------


def feed_noise(monkeypatch: pytest.MonkeyPatch, noise: Noise) -> None:
    """TorchRL draws inside; hand it ours in the order in which it asks."""
    uniforms = iter(noise.prior)
    normals = iter(noise.action)

    def rand(*shape: Any, **_: Any) -> Tensor:
        size = tuple(shape[0]) if isinstance(shape[0], tuple | torch.Size) else tuple(shape)
        if size == (T, 2, B, S):  # the window: prior draw (discarded) and posterior draw a step
            return torch.stack([torch.zeros_like(noise.posterior), noise.posterior], 1)
        assert size == (B * T, S), size
        return next(uniforms)

    def normal(shape: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return next(normals)

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", normal)


def test_losses_and_gradients_equal_torchrl(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner()
    agent, algo, batch = learner.agent, learner.algo, make_batch()
    noise = learner.draw_noise(B, T)
    theirs = v3_loss(agent, MODEL, algo)
    # TorchRL keeps a functional copy of the critic and its own slow critic.
    learner.agent.slow_critic.load_state_dict(agent.critic.state_dict())

    losses, _, observed = learner.losses(batch, noise)
    scales = learner.scales()
    ours = {k: scales[k] * v for k, v in losses.items()}
    ours_gradients = {
        name: dict(zip(learner.params, torch.autograd.grad(
            value, list(learner.params.values()), retain_graph=True, allow_unused=True),
            strict=True))
        for name, value in ours.items()
    }  # fmt: skip

    # TorchRL's record t holds action[t] and what it led to under "next"; equal initial latents.
    sample = TensorDict(
        state=agent.rssm.expand(batch["state"]).unsqueeze(1).expand(-1, T, -1),
        belief=batch["belief"].unsqueeze(1).expand(-1, T, -1),
        action=batch["action"][:, :-1], is_init=torch.zeros(B, T, 1, dtype=torch.bool),
        next=TensorDict(
            obs=batch["obs"][:, 1:], reward=batch["reward"][:, :-1].unsqueeze(-1),
            done=torch.zeros(B, T, 1, dtype=torch.bool),
            terminated=torch.zeros(B, T, 1, dtype=torch.bool), batch_size=[B, T],
        ),
        batch_size=[B, T],
    )  # fmt: skip
    feed_noise(monkeypatch, noise)
    # `(~terminated).float()` would round the continue target to float32.
    monkeypatch.setattr(Tensor, "float", lambda self: self.to(torch.float64))
    result = theirs(sample)
    names = {
        "reconstruction": "loss_model_reco", "reward": "loss_model_reward",
        "continue": "loss_model_continue", "dynamics": "loss_model_dynamic",
        "representation": "loss_model_representation", "actor": "loss_actor",
        "critic": "loss_value", "replay_critic": "loss_replay_value",
    }  # fmt: skip
    torch.testing.assert_close(
        result["replay_context", "belief"], observed.belief.detach(), rtol=0, atol=1e-9
    )
    for mine, their in names.items():
        torch.testing.assert_close(ours[mine], result[their], rtol=1e-6, atol=1e-6, msg=mine)
    # TorchRL may hold the critic's parameters as copies: what flows there counts as the critic's.
    own = list(learner.params.values())
    copies = [
        ("critic." + ".".join(str(k).split(".")[1:]), p)
        for k, p in theirs.value_loss.value_model_params.flatten_keys(".").items()
        if p.requires_grad and all(p is not q for q in own)
    ]
    checked = 0
    for mine, their in names.items():
        grads = torch.autograd.grad(
            result[their], own + [p for _, p in copies], retain_graph=True, allow_unused=True
        )
        total = dict(zip(learner.params, grads[: len(own)], strict=True))
        for (name, _), g in zip(copies, grads[len(own) :], strict=True):
            if g is not None:
                total[name] = g if total[name] is None else total[name] + g
        for name, g in ours_gradients[mine].items():
            zero = torch.zeros_like(learner.params[name])
            a, b = (zero if x is None else x for x in (g, total[name]))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=f"{mine}: {name}")
            checked += bool(a.any())
    assert checked > 100


# -- hand-computed -----------------------------------------------------------------------------


def test_torchrl_s_imagination_is_where_the_networks_are() -> None:
    learner = make_learner()
    agent = learner.agent.to("meta")  # stands for a GPU
    env: Any = v3_loss(agent, MODEL, learner.algo).actor_loss.model_based_env
    specs = (env.observation_spec, env.state_spec, env.action_spec, env.reward_spec)
    assert {env.device, *(s.device for s in specs)} == {torch.device("meta")}
    assert {p.device for p in agent.parameters()} == {torch.device("meta")}


def test_lambda_return_by_hand() -> None:
    reward, value = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    discount = torch.tensor([0.9, 0.0, 0.5])
    # R2 = 3 + .5 * 30 = 18; R1 = 2 + 0 = 2; R0 = 1 + .9 (.2 * 10 + .8 * 2) = 4.24
    expected = torch.tensor([4.24, 2.0, 18.0])
    torch.testing.assert_close(lambda_return(reward, value, discount, 0.8), expected)


def test_reset_rows_start_from_the_initial_belief() -> None:
    learner = make_learner()
    agent, batch = learner.agent, make_batch()
    batch["is_first"][1, 3] = True
    noise = learner.draw_noise(B, T)
    observed = learner.observe(batch, noise)
    zero = torch.zeros(1, D), torch.zeros(1, S * K), torch.zeros(1, A)
    expected = agent.rssm.core(zero[0], zero[1], agent.rssm.project_action(zero[2]))[0]
    torch.testing.assert_close(observed.belief[1, 2], expected)  # step t=3 is index 2
    # What comes after must not know what was before.
    changed = batch.clone()
    changed["obs"][1, :3] += 1.0
    changed["action"][1, :3] += 0.5
    changed["belief"][1] += 1.0
    again = learner.observe(changed, noise)
    torch.testing.assert_close(again.belief[1, 2:], observed.belief[1, 2:], rtol=0, atol=0)
    assert not torch.equal(again.belief[1, 1], observed.belief[1, 1])


def test_arrivals_at_an_episode_end_are_the_prior() -> None:
    learner = make_learner()
    agent, batch = learner.agent, make_batch()
    batch["is_first"][1, 3] = True
    noise = learner.draw_noise(B, T)
    observed = learner.observe(batch, noise)
    rssm = agent.rssm
    action = rssm.project_action(batch["action"][1:2, 2])
    raw = rssm.core(observed.belief[1:2, 1], observed.state[1:2, 1], action)
    state = rssm.sample(rssm.prior_logits(raw), noise.arrival[1:2, 2])
    torch.testing.assert_close(observed.arrival[1, 2], torch.cat([raw, state], -1)[0])
    elsewhere = torch.ones(B, T, dtype=torch.bool)
    elsewhere[1, 2] = False
    torch.testing.assert_close(observed.arrival[elsewhere], observed.features[elsewhere])


def test_last_reward_of_an_episode_is_trained_and_the_reset_observation_is_not_used_for_it() -> (
    None
):
    learner = make_learner()
    batch = make_batch()
    batch["is_first"][1, 3] = batch["terminated"][1, 2] = True
    noise = learner.draw_noise(B, T)
    before = learner.model_losses(batch, learner.observe(batch, noise))
    other = batch.clone()
    other["reward"][1, 2] += 5
    after = learner.model_losses(other, learner.observe(other, noise))
    assert before["reward"] != after["reward"]
    # With the next episode's first observations changed, steps up to the end lose nothing: only
    # rewards from t=4 on see them. Make those rows equal and the loss cannot move.
    arrival = learner.observe(batch, noise).arrival
    other = batch.clone()
    other["obs"][1, 3:] = -20 * other["obs"][1, 3:] + 30
    moved = learner.observe(other, noise).arrival
    torch.testing.assert_close(moved[1, :3], arrival[1, :3], rtol=0, atol=0)
    assert not torch.equal(moved[1, 3:], arrival[1, 3:])


def test_replay_critic_bootstraps_through_truncation_and_not_through_termination() -> None:
    learner = make_learner(slow_critic_scale=0.0)
    batch = make_batch()
    batch["is_first"][0, 3] = batch["truncated"][0, 2] = True
    batch["is_first"][1, 3] = batch["terminated"][1, 2] = True
    noise = learner.draw_noise(B, T)
    observed = learner.observe(batch, noise)
    first_return = torch.randn(B, T)
    agent, gamma, lmbda = learner.agent, 1 - 1 / ALGO.discount_horizon, ALGO.lmbda
    arrival = agent.critic.mean(agent.critic(observed.arrival))
    logits = agent.critic(observed.features)
    total = 0.0
    for b in range(B):
        carry = first_return[b, -1]
        for t in reversed(range(1, T)):  # state at step t, its action's outcome in record t
            reward = batch["reward"][b, t]
            if batch["terminated"][b, t]:
                carry = reward
            elif batch["truncated"][b, t]:
                carry = reward + gamma * arrival[b, t]
            else:
                boot = first_return[b, t]
                carry = reward + gamma * ((1 - lmbda) * boot + lmbda * carry)
            total += agent.critic.loss(logits[b, t - 1], carry.detach())
    loss = learner.replay_critic_loss(batch, observed, first_return)
    torch.testing.assert_close(loss, total / (B * (T - 1)))


def test_two_hot_loss_equals_torchrl() -> None:
    agent = make_learner().agent
    logits = torch.randn(50, MODEL.bins)
    target = torch.cat([torch.randn(44) * 50, agent.reward.twohot.bins[[0, 3, 10, -1]],
                        torch.tensor([1e12, -1e12])])  # fmt: skip
    expected = agent.reward.twohot.loss(logits, target)
    torch.testing.assert_close(agent.reward.loss(logits, target), expected)


def test_update_learns_and_reports() -> None:
    torch.set_default_dtype(torch.float32)
    learner = make_learner()
    learner.optimizer.lr, learner.optimizer.warmup = 1e-3, 0
    batch = make_batch()
    first = learner.update(batch)[0]
    for _ in range(200):
        metrics, latents = learner.update(batch)
    assert metrics["loss/reconstruction"] < 0.7 * first["loss/reconstruction"]
    assert metrics["loss/reward"] < 0.9 * first["loss/reward"]
    assert latents["belief"].shape == (B, T, D) and latents["state"].dtype == torch.uint8
    learner.check_finite()


def make_half(autocast: Any) -> Learner:
    torch.set_default_dtype(torch.float32)
    agent = make_learner().agent
    generator = torch.Generator().manual_seed(1)
    return Learner(agent, ALGO, OptimizationConfig(autocast=autocast), generator)


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(autocast: Any) -> None:
    torch.set_default_dtype(torch.float32)
    exact, half = make_learner(), make_half(autocast)
    if half.scale is not None:
        half.scale.value.fill_(2.0**10)  # the initial one overflows once, which costs an update
    assert half.net is not half.agent and half.net.rssm.dtype == getattr(torch, autocast)
    for seed in range(3):
        one, other = (x.update(make_batch(seed))[0] for x in (exact, half))
        for k in (
            "loss/reconstruction",
            "loss/reward",
            "loss/critic",
            "loss/continue",
            "grad_norm",
        ):
            assert other[k] == pytest.approx(float(one[k]), rel=0.05, abs=0.05), (seed, k)
    assert half.flat.dtype == torch.float32 and bool((half.flat != exact.flat).any())


def test_an_overflow_of_float16_costs_one_update() -> None:
    half = make_half("float16")
    assert half.scale is not None
    half.scale.value.fill_(2.0**40)
    learned = half.optimizer.flat  # the slow critic moves on
    before, momentum = learned.clone(), half.optimizer.momentum.clone()
    half.update(make_batch(0))
    assert torch.equal(learned, before) and torch.equal(half.optimizer.momentum, momentum)
    assert half.optimizer.step_count == 0 and half.scale.value == 2.0**39
    half.check_finite()
    for _ in range(30):
        half.update(make_batch(0))
    assert 0 < half.optimizer.step_count < 31 and bool((learned != before).any())
    # Gradients that no scale helps are an error in the end.
    half.scale.value.fill_(half.scale.SMALLEST / 2)
    half.scale.good.fill_(0)
    with torch.no_grad():
        half.flat.fill_(1e30)
    half.update(make_batch(0))
    with pytest.raises(NonFiniteError):
        half.check_finite()


def test_the_scale_grows_after_updates_without_overflow() -> None:
    scale = LossScale(torch.device("cpu"))
    good, bad = torch.tensor(True), torch.tensor(False)
    for _ in range(LossScale.PATIENCE - 1):
        scale.update(good)
    assert scale.value == LossScale.INITIAL
    scale.update(good)
    assert scale.value == 2 * LossScale.INITIAL and scale.good == 0
    scale.update(good)
    scale.update(bad)
    assert scale.value == LossScale.INITIAL and scale.good == 0


def test_records_in_another_memory_travel_and_latents_return() -> None:
    class Elsewhere:
        """A source whose device is not the learner's (the same memory by another name)."""

        device, generators = torch.device("cpu", 0), []

        def sample(self) -> TensorDict:
            return make_batch()

        def refresh(self, batch: TensorDict, latents: TensorDict) -> None:
            self.got = latents["belief"].clone()

    near, far, source = make_learner(), make_learner(), Elsewhere()
    _, latents = near.update(make_batch())
    far.train(source)  # type: ignore[arg-type]
    assert far.updates == 1 and torch.equal(source.got, latents["belief"])
    assert torch.equal(near.flat, far.flat)


@pytest.mark.parametrize(("ahead", "waited_for"), [(0, [0, 1, 2]), (1, [0, 1]), (2, [0])])
def test_a_launch_waits_for_all_but_the_updates_that_may_be_ahead(
    ahead: int, waited_for: list[int]
) -> None:
    class Event:
        def __init__(self, number: int):
            self.number = number

        def synchronize(self) -> None:
            ended.append(self.number)

    ended: list[int] = []
    learner = make_learner()
    learner.ahead, learner._launched = ahead, [Event(i) for i in range(3)]  # type: ignore[misc]
    learner._keep_pace()
    assert ended == waited_for and len(learner._launched) == ahead


def test_a_nan_is_noticed() -> None:
    learner = make_learner()
    batch = make_batch()
    batch["reward"][0, 0] = torch.nan
    learner.update(batch)
    with pytest.raises(RuntimeError, match="NaN"):
        learner.check_finite()


def test_slow_critic_follows_at_its_rate() -> None:
    learner = make_learner()
    agent = learner.agent
    before = agent.slow_critic.net.model[0].weight.clone()
    learner.update(make_batch())
    after, target = agent.slow_critic.net.model[0].weight, agent.critic.net.model[0].weight
    torch.testing.assert_close(after, before + 0.02 * (target - before))
