"""All networks of one agent, and the step that acts."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamer_isaac.config import AlgoConfig, ModelConfig
from dreamer_isaac.models.gaussian import GaussianRSSM
from dreamer_isaac.models.heads import (
    Actor,
    ContinueHead,
    ImageDecoder,
    ImageEncoder,
    MixedDecoder,
    MixedEncoder,
    PlainDecoder,
    PlainEncoder,
    PlainImageDecoder,
    PlainImageEncoder,
    ScalarHead,
    TanhActor,
    TwoHotHead,
    VectorDecoder,
    VectorEncoder,
)
from dreamer_isaac.models.rssm import RSSM


class Carry(NamedTuple):
    """What acting remembers between two steps of N envs."""

    belief: Tensor
    """[N, D] belief after the last observation."""
    state: Tensor
    """[N, S*K] posterior state after the last observation."""
    action: Tensor
    """[N, A] the last action as executed."""


class Agent(nn.Module):
    """World model, actor and critic.

    Args:
        observation: O, components of the observation. action: A, components of the action.
        pixels: height, width and channels of the pictures, where there are any.
    """

    # Two families of networks with the same interfaces (rssm.py, gaussian.py, heads.py).
    encoder: Any
    rssm: Any
    decoder: Any
    reward: Any
    continuation: Any
    actor: Any
    critic: Any
    slow_critic: Any

    def __init__(
        self,
        observation: int,
        action: int,
        model: ModelConfig,
        algo: AlgoConfig,
        pixels: tuple[int, int, int] | None = None,
    ):
        super().__init__()
        self.observation, self.action, self.pixels = observation, action, pixels
        units, depth, plain = model.units, model.cnn_depth, model.latent == "gaussian"
        make = PlainEncoder if plain else VectorEncoder
        self.encoder = make(observation, units, model.encoder_layers) if observation else None
        if pixels:
            image = (PlainImageEncoder if plain else ImageEncoder)(pixels, depth)
            self.encoder = MixedEncoder(image, self.encoder)
        if plain:
            self.rssm = GaussianRSSM(
                action, self.encoder.width, model.belief, model.hidden, model.gaussian
            )
            features = self.features = model.belief + self.rssm.state
            self.decoder = self._decoder(PlainDecoder, model)
            if pixels:
                image = PlainImageDecoder(features, pixels, depth)
                self.decoder = MixedDecoder(image, self.decoder)
            self.reward = ScalarHead(features, units, model.head_layers)
            self.continuation = None
            self.actor = TanhActor(features, action, units, model.actor_layers)
            self.critic = ScalarHead(features, units, model.critic_layers)
        else:
            self.rssm = RSSM(
                action, self.encoder.width, model.belief, model.hidden, model.categoricals,
                model.classes, model.blocks, model.unimix,
            )  # fmt: skip
            features = self.features = model.belief + self.rssm.state
            self.decoder = self._decoder(VectorDecoder, model)
            if pixels:
                image = ImageDecoder(features, pixels, depth, model.blocks)
                self.decoder = MixedDecoder(image, self.decoder)
            self.reward = TwoHotHead(features, units, model.head_layers, model.bins)
            self.continuation = ContinueHead(features, units, model.head_layers)
            self.actor = Actor(
                features, action, units, model.actor_layers, algo.actor_min_std, algo.actor_max_std
            )
            self.critic = TwoHotHead(features, units, model.critic_layers, model.bins)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def _decoder(self, make: Any, model: ModelConfig) -> nn.Module | None:
        """The vector's decoder, where a vector is observed."""
        if not self.observation:
            return None
        return make(self.features, self.observation, model.units, model.decoder_layers)

    def learned(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimiser updates (not the slow critic's), by name."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad}

    def draw_noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What one draw of the stochastic state takes: [*lead, S]."""
        make = torch.rand if self.rssm.noise == "uniform" else torch.randn
        return make(*lead, self.rssm.noise_width, generator=generator, device=generator.device)

    def initial_carry(self, envs: int) -> Carry:
        """Zeros; `act` replaces them where `is_first`."""
        zeros = next(self.parameters()).new_zeros
        return Carry(
            zeros(envs, self.rssm.belief), zeros(envs, self.rssm.state), zeros(envs, self.action)
        )

    def belief_step(self, carry: Carry, is_first: Tensor) -> Tensor:
        """[N, D]: the belief at a new observation, the episode's first one where `is_first`."""
        raw = self.rssm.core(carry.belief, carry.state, self.rssm.project_action(carry.action))
        return torch.where(is_first.unsqueeze(-1), self.rssm.initial_belief(), raw)

    @torch.no_grad()
    def act(
        self,
        observation: Tensor,
        is_first: Tensor,
        carry: Carry,
        noise: Tensor,
        normal: Tensor,
        deterministic: Tensor,
        pixels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One acting step.

        Args:
            observation: [N, O]. is_first: [N] bool. carry: after the last step.
            noise: [N, S] of the posterior, from `draw_noise`. normal: [N, A] of the policy.
            deterministic: [N] bool; these rows take the policy's mean. The posterior is sampled
                for every row, as in the reference: the networks have only seen samples, and its
                mode as a state played far worse (cartpole: 1.3 where samples gave 4.9).
            pixels: [N, H, W, C] uint8, where the agent has been built for them.

        Returns:
            belief [N, D] and state [N, S*K] after `observation`, and the action [N, A] of the
            policy, not clipped yet.
        """
        embedding = self.rssm.project_embedding(self.encoder(observation, pixels))
        belief = self.belief_step(carry, is_first)
        logits = self.rssm.posterior_logits(belief, embedding)
        state = self.rssm.draw(logits, noise)
        mean, std = self.actor(torch.cat([belief, state], -1))
        greedy, sampled = self.actor.mode(mean), self.actor.sample(mean, std, normal)
        action = torch.where(deterministic.unsqueeze(-1), greedy, sampled)
        return belief, state, action

    @torch.no_grad()
    def predict(
        self, carry: Carry, actions: Tensor, generator: torch.Generator, samples: int = 16
    ) -> tuple[Tensor, Tensor | None]:
        """Open-loop prediction: the observations that `actions` are expected to lead to.

        Args:
            carry: belief and state at the start; its action is not used.
            actions: [N, T, A], the first one taken at the start.
            samples: the prediction is the mean of so many sampled futures. (One future of modes
                instead leaves what the networks have been trained on: an ant's error was 9 times
                the data's spread after 50 steps.)

        Returns:
            [N, T, O], in the observation's units, and pictures [N, T, H, W, C] in [0, 1] where the
            agent sees any: of the first sampled future, because a mean of pictures is a blur.
        """
        belief, state = (x.repeat_interleave(samples, 0) for x in (carry.belief, carry.state))
        features = []
        for action in self.rssm.project_action(actions).unbind(1):
            belief = self.rssm.core(belief, state, action.repeat_interleave(samples, 0))
            noise = self.draw_noise((len(belief),), generator)
            state = self.rssm.draw(self.rssm.prior_logits(belief), noise)
            features.append(torch.cat([belief, state], -1))
        futures = torch.stack(features, 1)
        decoded = self.decoder.decode(futures).unflatten(0, (-1, samples)).mean(1)
        return decoded, self.decoder.decode_pixels(futures[::samples]) if self.pixels else None
