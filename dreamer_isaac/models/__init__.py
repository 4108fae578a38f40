"""The networks: plain nn.Modules on tensors. Shapes: B batch, T time, N envs, H horizon,
A action, O observation, D belief, S categoricals, K classes, E embedding, U units, F = D + S*K."""

from dreamer_isaac.models.agent import Agent, Carry

__all__ = ["Agent", "Carry"]
