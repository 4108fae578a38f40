"""TorchRL's own Dreamer losses around our networks: what the tests compare with and what
`bench.py learner --compare` times. The modules share our agent's parameters, so that gradients
land in one place."""

# TorchRL's annotations are narrower than what its modules take.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchrl.modules.models.model_based as torchrl_models
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.model_based.dreamer import DreamerEnv
from torchrl.modules import SymExpTwoHot, TanhNormal, WorldModelWrapper
from torchrl.modules.models.model_based import (
    RSSMPosterior,
    RSSMPosteriorV3,
    RSSMPrior,
    RSSMPriorV3,
    RSSMRollout,
    RSSMRolloutV3,
)
from torchrl.objectives import (
    DreamerActorLoss,
    DreamerModelLoss,
    DreamerV3ActorLoss,
    DreamerV3Loss,
    DreamerV3ModelLoss,
    DreamerV3ValueLoss,
    DreamerValueLoss,
    SoftUpdate,
)
from torchrl.trainers.algorithms.dreamer_v3 import DreamerV3OptimizationStepper, DreamerV3Optimizer

from dreamer_isaac.config import AlgoConfig, Config, ModelConfig
from dreamer_isaac.models import Agent


class Split(nn.Module):
    """[belief, state] features in our order, from TorchRL's separate keys."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, state: Tensor, belief: Tensor) -> Any:
        return self.net(torch.cat([belief, state], -1))


class Head(nn.Module):
    """A two-hot head as (logits, mean)."""

    def __init__(self, net: nn.Module, twohot: SymExpTwoHot):
        super().__init__()
        self.net, self.twohot = net, twohot

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(torch.cat([belief, state], -1))
        return logits, self.twohot(logits)


class Symexp(nn.Module):
    """Our decoder predicts in symlog space, TorchRL's loss takes the symlog itself."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent

    def forward(self, state: Tensor, belief: Tensor) -> Tensor:
        return self.agent.decoder.decode(torch.cat([belief, state], -1))


class Continue(nn.Module):
    def __init__(self, agent: Agent, probability: bool):
        super().__init__()
        self.agent, self.probability = agent, probability

    def forward(self, state: Tensor, belief: Tensor) -> Tensor:
        logit = self.agent.continuation(torch.cat([belief, state], -1)).unsqueeze(-1)
        return logit.sigmoid() if self.probability else logit


def imagination_env(agent: Agent, world: WorldModelWrapper, state: int, belief: int) -> DreamerEnv:
    """On the agent's device: the losses' `to` would leave it on the CPU, where it begins."""
    device = next(agent.parameters()).device
    env = DreamerEnv(world, prior_shape=(state,), belief_shape=(belief,), device=device)
    env.observation_spec = Composite(
        state=Unbounded(state, device=device), belief=Unbounded(belief, device=device),
        device=device,
    )  # fmt: skip
    env.state_spec = env.observation_spec.clone()
    env.action_spec = Unbounded((agent.action,), device=device)
    env.reward_spec = Unbounded((1,), device=device)
    return env


def v3_rssm(agent: Agent, model: ModelConfig) -> tuple[RSSMPriorV3, RSSMPosteriorV3]:
    """TorchRL's modules *sharing* our parameters, so that gradients land in one place."""
    ours = agent.rssm
    prior = RSSMPriorV3(
        action_shape=torch.Size([agent.action]), action_dim=agent.action,
        hidden_dim=model.hidden, rnn_hidden_dim=model.belief,
        num_categoricals=model.categoricals, num_classes=model.classes,
        recurrent_model="block_gru", num_blocks=model.blocks, unimix=model.unimix,
    )  # fmt: skip
    posterior = RSSMPosteriorV3(
        hidden_dim=model.hidden, num_categoricals=model.categoricals,
        num_classes=model.classes, rnn_hidden_dim=model.belief,
        obs_embed_dim=model.units, use_rms_norm=True, unimix=model.unimix,
    )  # fmt: skip

    def share(theirs: nn.Module, mine: nn.Module) -> None:
        for name, p in list(mine.named_parameters(recurse=False)):
            theirs.register_parameter(name, p)

    for theirs, mine in (
        (prior.rnn.belief_projection, ours.belief_in), (prior.rnn.state_projection, ours.state_in),
        (prior.rnn.action_projection, ours.action_in), (prior.rnn_to_prior_projector, ours.prior),
    ):  # fmt: skip
        for a, b in zip(theirs, mine, strict=True):
            share(a, b)
    share(prior.rnn.hidden_layers[0], ours.mix)
    share(prior.rnn.hidden_layers[1], ours.mix_norm)
    share(prior.rnn.gates, ours.gates)
    layers = [m for m in posterior.modules() if not list(m.children())]
    norms = [m for m in layers if isinstance(m, torchrl_models._DreamerV3RMSNorm)]
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    share(linears[0], ours.posterior_in)
    share(norms[0], ours.posterior_norm)
    share(linears[1], ours.posterior_out)
    return prior, posterior


def v3_loss(agent: Agent, model: ModelConfig, algo: AlgoConfig) -> DreamerV3Loss:
    """The complete loss, as TorchRL's optimisation stepper takes it."""
    prior, posterior = v3_rssm(agent, model)
    width = model.categoricals * model.classes
    encoder = TensorDictModule(
        agent.encoder, in_keys=[("next", "obs")], out_keys=[("next", "encoded_latents")]
    )
    rollout = RSSMRolloutV3(
        TensorDictModule(
            prior, in_keys=["state", "belief", "action"],
            out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        TensorDictModule(
            posterior, in_keys=[("next", "belief"), ("next", "encoded_latents")],
            out_keys=[("next", "posterior_logits"), ("next", "state")],
        ),
        reset_key="is_init",
    )  # fmt: skip
    features = [("next", "state"), ("next", "belief")]
    twohot = agent.reward.twohot
    world = TensorDictSequential(
        encoder, rollout,
        TensorDictModule(Symexp(agent), in_keys=features, out_keys=[("next", "reco_pixels")]),
        TensorDictModule(
            Head(agent.reward, twohot), in_keys=features,
            out_keys=[("next", "reward_logits"), ("next", "reward")],
        ),
        TensorDictModule(
            Continue(agent, False), in_keys=features, out_keys=[("next", "continue_pred")]
        ),
    )  # fmt: skip
    imagination = WorldModelWrapper(
        TensorDictModule(
            prior, in_keys=["state", "belief", "action"], out_keys=["_", "state", "belief"]
        ),
        TensorDictModule(
            Head(agent.reward, twohot), in_keys=["state", "belief"], out_keys=["_l", "reward"]
        ),
    )
    env = imagination_env(agent, imagination, width, model.belief)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(
            Split(agent.actor), in_keys=["state", "belief"], out_keys=["loc", "scale"]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], return_log_prob=True,
            distribution_class=lambda loc, scale: torch.distributions.Independent(
                torch.distributions.Normal(loc, scale), 1
            ),
        ),
    )  # fmt: skip
    value = TensorDictModule(
        Head(agent.critic, agent.critic.twohot), in_keys=["state", "belief"],
        out_keys=["value_logits", "state_value"],
    )  # fmt: skip
    model_loss = DreamerV3ModelLoss(
        world, reward_two_hot=True, num_reward_bins=model.bins, kl_mode="separate",
        lambda_kl=1.0, lambda_dynamic=algo.dyn_scale, lambda_representation=algo.rep_scale,
        free_bits=algo.free_nats, unimix=model.unimix, lambda_continue=1.0,
        continue_target_scale=1 - 1 / algo.discount_horizon, detach_output=False,
        reco_symlog=True,
    )  # fmt: skip
    model_loss.set_keys(pixels="obs")
    actor_loss = DreamerV3ActorLoss(
        actor, value, env, imagination_horizon=algo.horizon, use_reinforce=True,
        entropy_bonus=algo.entropy,
        continuation_model=TensorDictModule(
            Continue(agent, True), in_keys=["state", "belief"], out_keys=["continuation"]
        ),
    )  # fmt: skip
    actor_loss.make_value_estimator(gamma=1.0, lmbda=algo.lmbda)
    value_loss = DreamerV3ValueLoss(
        value, value_loss="two_hot", num_value_bins=model.bins, actor_loss=actor_loss,
        slow_critic_regularization=algo.slow_critic_scale,
    )  # fmt: skip
    value_loss.set_keys(value_logits="value_logits")
    return DreamerV3Loss(
        model_loss, actor_loss, value_loss, replay_value_loss_weight=algo.replay_critic_scale,
        continuation_horizon=algo.discount_horizon, lmbda=algo.lmbda,
    )  # fmt: skip


# -- the first Dreamer ---------------------------------------------------------------------


class Joined(nn.Module):
    """Our networks read [belief, state]; TorchRL's modules pass them apart."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...] = (1,)):
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, state: Tensor, belief: Tensor) -> Tensor:
        out = self.net(torch.cat([belief, state], -1))
        return out.view(*state.shape[:-1], *self.shape)


class ActorNet(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.extract = NormalParamExtractor(scale_mapping="biased_softplus_5.0_0.0001")

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, ...]:
        return self.extract(self.net(torch.cat([belief, state], -1)))


def share_in_order(theirs: nn.Module, mine: nn.Module) -> None:
    for (name, _), p in zip(
        list(theirs.named_parameters(recurse=False)), mine.parameters(recurse=False), strict=True
    ):
        theirs.register_parameter(name, p)


def v1_rssm(agent: Agent, model: ModelConfig) -> tuple[RSSMPrior, RSSMPosterior]:
    """TorchRL's modules sharing our parameters."""
    ours = agent.rssm
    prior = RSSMPrior(
        Unbounded((agent.action,)), model.hidden, model.belief, model.gaussian, scale_lb=0.1,
        action_dim=agent.action,
    )  # fmt: skip
    prior.rnn = nn.GRUCell(model.hidden, model.belief)  # TorchRL's own insists on float32
    posterior = RSSMPosterior(model.hidden, model.gaussian, 0.1, model.belief, model.units)
    share_in_order(prior.action_state_projector[0], ours.joint_in)
    share_in_order(prior.rnn, ours.rnn)
    for theirs, mine in ((prior.rnn_to_prior_projector, ours.prior),
                         (posterior.obs_rnn_to_post_projector, ours.posterior)):  # fmt: skip
        for i in (0, 2):
            share_in_order(theirs[i], mine[i])
    return prior, posterior


def v1_losses(
    agent: Agent, model: ModelConfig, algo: AlgoConfig
) -> tuple[DreamerModelLoss, DreamerActorLoss, DreamerValueLoss]:
    """The three losses, which are evaluated one after the other."""
    prior, posterior = v1_rssm(agent, model)
    features = [("next", "state"), ("next", "belief")]
    rollout = RSSMRollout(
        TensorDictModule(
            prior, in_keys=["state", "belief", "action"],
            out_keys=[("next", "prior_mean"), ("next", "prior_std"), "_", ("next", "belief")],
        ),
        TensorDictModule(
            posterior, in_keys=[("next", "belief"), ("next", "encoded_latents")],
            out_keys=[("next", "posterior_mean"), ("next", "posterior_std"), ("next", "state")],
        ),
    )  # fmt: skip
    world = TensorDictSequential(
        TensorDictSequential(
            TensorDictModule(
                agent.encoder, in_keys=[("next", "vector")], out_keys=[("next", "encoded_latents")]
            ),
            rollout,
            TensorDictModule(  # four trailing sizes, so that the loss sums over O alone
                Joined(agent.decoder, (1, 1, agent.observation)), in_keys=features,
                out_keys=[("next", "reco_pixels")],
            ),
        ),
        TensorDictModule(Joined(agent.reward), in_keys=features, out_keys=[("next", "reward")]),
    )  # fmt: skip
    model_loss = DreamerModelLoss(world, free_nats=algo.free_nats)  # type: ignore[arg-type]

    imagination = WorldModelWrapper(
        TensorDictModule(
            prior, in_keys=["state", "belief", "action"],
            out_keys=["_m", "_s", "state", "belief"],
        ),
        TensorDictModule(Joined(agent.reward), in_keys=["state", "belief"], out_keys=["reward"]),
    )  # fmt: skip
    env = imagination_env(agent, imagination, model.gaussian, model.belief)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(
            ActorNet(agent.actor.net), in_keys=["state", "belief"], out_keys=["loc", "scale"]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
            distribution_kwargs={"tanh_loc": True},
        ),
    )
    value = TensorDictModule(
        Joined(agent.critic), in_keys=["state", "belief"], out_keys=["state_value"]
    )
    actor_loss = DreamerActorLoss(
        actor,
        value,
        env,
        imagination_horizon=algo.horizon,
        discount_loss=True,  # type: ignore[arg-type]
    )
    # Without time_dim TorchRL 0.14.1 takes the last dimension (size 1) for time, because the loss
    # hands over a TensorDict without batch dimensions, and the return is TD(0) whatever lambda is.
    actor_loss.make_value_estimator(
        gamma=1 - 1 / algo.discount_horizon, lmbda=algo.lmbda, time_dim=-2
    )
    value_loss = DreamerValueLoss(
        value,
        discount_loss=True,
        gamma=1 - 1 / algo.discount_horizon,  # type: ignore[arg-type]
    )
    return model_loss, actor_loss, value_loss


# -- one update of each, to be timed ---------------------------------------------------------


def random_records(
    agent: Agent, slices: int, length: int, latent: Tensor, device: torch.device
) -> TensorDict:
    """[slices, length] transitions in TorchRL's form; `latent`: a state [slices, length, ...]."""
    shape = (slices, length)
    flag = torch.zeros(*shape, 1, dtype=torch.bool, device=device)
    obs = torch.randn(*shape, agent.observation, device=device)
    return TensorDict(
        state=latent, belief=torch.zeros(*shape, agent.rssm.belief, device=device),
        action=torch.rand(*shape, agent.action, device=device), is_init=flag,
        next=TensorDict(
            obs=obs, vector=obs, pixels=obs.reshape(*shape, 1, 1, -1),
            reward=torch.randn(*shape, 1, device=device), done=flag, terminated=flag,
            batch_size=list(shape), device=device,
        ),
        batch_size=list(shape), device=device,
    )  # fmt: skip


def v3_update(
    agent: Agent, cfg: Config, slices: int, length: int, device: torch.device
) -> Callable[[], Any]:
    """One update by `DreamerV3OptimizationStepper` with its defaults, warmed up: on CUDA the
    forward and backward pass compiled and captured. No sampling, no write-back of latents."""
    loss = v3_loss(agent, cfg.model, cfg.algo).to(device)
    o = cfg.optimization
    parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer = DreamerV3Optimizer(parameters, lr=o.lr, agc=o.agc, warmup_steps=o.warmup_updates)
    updater = SoftUpdate(loss.value_loss, tau=cfg.algo.slow_critic_rate)
    stepper = DreamerV3OptimizationStepper(
        loss, optimizer, updater, mixed_precision=o.autocast == "bfloat16"
    )
    classes = torch.zeros(slices, length, cfg.model.categoricals, dtype=torch.long, device=device)
    sample = random_records(agent, slices, length, agent.rssm.expand(classes), device)
    stepper.warmup(sample.clone())
    return lambda: stepper.step(None, sample.clone())


def v1_update(
    agent: Agent, cfg: Config, slices: int, length: int, device: torch.device
) -> Callable[[], Any]:
    """One update as TorchRL's example makes it: three losses, three Adams, eager, under autocast.
    No sampling, no write-back of latents."""
    losses = [x.to(device) for x in v1_losses(agent, cfg.model, cfg.algo)]
    own: list[list[nn.Parameter]] = [[], [], []]
    for name, p in agent.named_parameters():
        if p.requires_grad:
            own[{"actor": 1, "critic": 2}.get(name.split(".")[0], 0)].append(p)
    own[2] = [p for p in losses[2].parameters() if p.requires_grad]  # it holds copies
    a, o = cfg.algo, cfg.optimization
    adams = [
        torch.optim.Adam(p, lr=lr)
        for p, lr in zip(own, (o.lr, a.lr_actor, a.lr_critic), strict=True)
    ]
    state = torch.zeros(slices, length, cfg.model.gaussian, device=device)
    sample = random_records(agent, slices, length, state, device)

    def apply(index: int, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(own[index], a.grad_clip)
        adams[index].step()
        for adam in adams:
            adam.zero_grad()

    def update() -> None:
        half = o.autocast == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            result, seen = losses[0](sample.clone())
            parts = [v.sum() for k, v in result.items() if str(k).startswith("loss_")]
        apply(0, torch.stack(parts).sum())
        start = TensorDict(
            state=seen["next", "state"].detach().flatten(0, 1),
            belief=seen["next", "belief"].detach().flatten(0, 1), batch_size=[slices * length],
        )  # fmt: skip
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            result, imagined = losses[1](start.float())
        apply(1, result["loss_actor"])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            result, _ = losses[2](imagined.detach())
        apply(2, result["loss_value"])

    return update
