"""Encoder, decoder and the heads on top of the latent features.

Hidden layers have the weights' dtype; what a head returns is float32 at least, because losses,
softmaxes and symexp of half-precision values are not good enough.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import (
    MLP,
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    ObsDecoder,
    ObsEncoder,
    SymExpTwoHot,
)

from dreamer_isaac.models.rssm import elu, full, linear


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The reverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class VectorEncoder(nn.Module):
    """[..., O] observations -> [..., U] embedding; symlog first."""

    def __init__(self, observation: int, units: int, layers: int):
        super().__init__()
        self.net = DreamerV3MLP(observation, None, depth=layers, num_cells=units)
        self.width = units

    def forward(self, observation: Tensor, pixels: Tensor | None = None) -> Tensor:
        return self.net(symlog(observation).to(next(self.parameters()).dtype))


class VectorDecoder(nn.Module):
    """[..., F] features -> [..., O] prediction of symlog(observation)."""

    def __init__(self, features: int, observation: int, units: int, layers: int):
        super().__init__()
        self.net = DreamerV3MLP(features, observation, depth=layers, num_cells=units)

    def forward(self, features: Tensor) -> Tensor:
        return full(self.net(features))

    @staticmethod
    def loss(prediction: Tensor, observation: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Squared error in symlog space, summed over O: [..., O] -> [...]."""
        return (prediction - symlog(observation)).square().sum(-1)

    def decode(self, features: Tensor) -> Tensor:
        """[..., F] -> [..., O] in the observation's own units."""
        return symexp(self(features))


# -- pictures ------------------------------------------------------------------------------------

Shape = tuple[int, int, int]
"""Height, width, channels of a picture."""


class ImageEncoder(nn.Module):
    """[..., H, W, C] uint8 -> [..., E]: four convolutions that halve the picture by their stride
    (TorchRL's; the reference has stride 1 and max-pooling)."""

    def __init__(self, shape: Shape, depth: int):
        super().__init__()
        height, width, channels = shape
        self.net = DreamerV3ImageEncoder(channels, depth)
        self.width = self.net.output_features((channels, height, width))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(unit_interval(pixels, next(self.parameters()).dtype))


class ImageDecoder(nn.Module):
    """[..., F] features -> [..., C, H, W] prediction of the picture in [0, 1] (unbounded).

    TorchRL's, which is not quite the reference's: the features enter as one vector cut into blocks,
    so that of the first map's channels only the last quarter or so see the state (the reference
    projects it to all of them), and it upsamples by transposed convolutions, without a sigmoid.
    """

    def __init__(self, features: int, shape: Shape, depth: int, blocks: int):
        super().__init__()
        height, width, channels = shape
        first = 4 * depth * (height // 16) * (width // 16)  # numbers in the smallest picture
        blocks = blocks if features % blocks == 0 and first % blocks == 0 else 1
        self.net = DreamerV3ImageDecoder(
            features, (channels, height, width), depth, num_blocks=blocks
        )

    def forward(self, features: Tensor) -> Tensor:
        return full(self.net(features))


class PlainImageEncoder(nn.Module):
    """The first Dreamer's: [..., 64, 64, C] uint8 -> [..., 32 depth]."""

    def __init__(self, shape: Shape, depth: int):
        super().__init__()
        self.net = ObsEncoder(depth, in_channels=shape[2])
        self.width = 32 * depth

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(unit_interval(pixels, next(self.parameters()).dtype) - 0.5)


class PlainImageDecoder(nn.Module):
    """The first Dreamer's: [..., F] features -> [..., C, 64, 64], a picture in [0, 1]."""

    def __init__(self, features: int, shape: Shape, depth: int):
        super().__init__()
        self.features = features
        self.net = ObsDecoder(depth, latent_dim=features, out_channels=shape[2])

    def forward(self, features: Tensor) -> Tensor:
        features = features[..., : self.features]  # wider, with zeros, in half precision
        return full(self.net(features[..., :1], features[..., 1:])) + 0.5  # it joins two parts


def unit_interval(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., H, W, C] of 0 to 255 -> [..., C, H, W] of 0 to 1."""
    return pixels.movedim(-1, -3).to(dtype) / 255


class MixedEncoder(nn.Module):
    """Pictures, and the observed vector beside them if there is one."""

    def __init__(self, image: nn.Module, vector: nn.Module | None):
        super().__init__()
        self.image, self.vector = image, vector
        self.width: int = sum(m.width for m in (image, vector) if m is not None)  # type: ignore[misc]

    def forward(self, observation: Tensor, pixels: Tensor) -> Tensor:
        """[..., O], [..., H, W, C] -> [..., E]."""
        parts = [self.image(pixels)]
        if self.vector is not None:
            parts.append(self.vector(observation))
        return torch.cat(parts, -1)


class MixedDecoder(nn.Module):
    """The reverse of `MixedEncoder`; a prediction is (picture, vector or None)."""

    def __init__(self, image: nn.Module, vector: nn.Module | None):
        super().__init__()
        self.image, self.vector = image, vector

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        vector = None if self.vector is None else self.vector(features)
        return self.image(features), vector

    def loss(
        self, prediction: tuple[Tensor, Tensor | None], observation: Tensor, pixels: Tensor
    ) -> Tensor:
        """Squared error summed over pixels and channels, and the vector's: [...]."""
        picture, vector = prediction
        target = unit_interval(pixels, picture.dtype)
        loss = (picture - target).square().flatten(-3).sum(-1)
        if self.vector is not None:
            loss = loss + self.vector.loss(vector, observation)  # type: ignore[operator]
        return loss

    def decode(self, features: Tensor) -> Tensor:
        """[..., F] -> [..., O] in the observation's own units; O may be 0."""
        if self.vector is None:
            return features[..., :0]
        return self.vector.decode(features)  # type: ignore[operator]

    def decode_pixels(self, features: Tensor) -> Tensor:
        """[..., F] -> [..., H, W, C], float in [0, 1]."""
        return self.image(features).movedim(-3, -1).clamp(0, 1)


class TwoHotHead(nn.Module):
    """A scalar as a categorical over symexp-spaced bins; starts by predicting exactly 0."""

    def __init__(self, features: int, units: int, layers: int, bins: int):
        super().__init__()
        self.net = DreamerV3MLP(features, bins, depth=layers, num_cells=units, outscale=0.0)
        self.twohot = SymExpTwoHot(bins)

    def forward(self, features: Tensor) -> Tensor:
        """[..., F] -> logits [..., bins]."""
        return full(self.net(features))

    def mean(self, logits: Tensor) -> Tensor:
        """[..., bins] -> [...]: the expectation."""
        return self.twohot.decode(logits)

    def loss(self, logits: Tensor, target: Tensor, *more: tuple[Tensor, float]) -> Tensor:
        """Cross entropy with the two-hot target, and with `more` targets times their weights:
        [..., bins], [...] -> [...].

        Equal to `SymExpTwoHot.loss`, without its [..., bins] comparison and dense target: the
        two bins around the target are found by bisection and only their log-probabilities read.
        """
        bins = self.twohot.get_buffer("bins")
        log = torch.log_softmax(logits, -1)
        total = torch.zeros_like(log[..., 0])
        for value, scale in ((target, 1.0), *more):
            value = value.clamp(bins[0], bins[-1]).contiguous()
            lower = (torch.searchsorted(bins, value, right=True) - 1).clamp(0, len(bins) - 2)
            weight = (value - bins[lower]) / (bins[lower + 1] - bins[lower])
            below = log.gather(-1, lower.unsqueeze(-1)).squeeze(-1)
            above = log.gather(-1, lower.unsqueeze(-1) + 1).squeeze(-1)
            total = total - scale * ((1 - weight) * below + weight * above)
        return total


class ContinueHead(nn.Module):
    """[..., F] -> logit [...] of the episode going on."""

    def __init__(self, features: int, units: int, layers: int):
        super().__init__()
        self.net = DreamerV3MLP(features, 1, depth=layers, num_cells=units)

    def forward(self, features: Tensor) -> Tensor:
        return full(self.net(features)).squeeze(-1)


class Actor(nn.Module):
    """Normal policy with a bounded mean and standard deviation (the reference's bounded_normal).

    mean = tanh(.), std = (max - min) sigmoid(. + 2) + min.
    """

    def __init__(
        self, features: int, action: int, units: int, layers: int, min_std: float, max_std: float
    ):
        super().__init__()
        self.net = DreamerV3MLP(features, 2 * action, depth=layers, num_cells=units, outscale=0.01)
        self.min_std, self.max_std = min_std, max_std

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[..., F] -> mean, std: [..., A] each."""
        mean, std = full(self.net(features)).chunk(2, -1)
        std = (self.max_std - self.min_std) * torch.sigmoid(std + 2) + self.min_std
        return torch.tanh(mean), std

    @staticmethod
    def sample(mean: Tensor, std: Tensor, normal: Tensor) -> Tensor:
        """The action that `normal` [..., A] leads to."""
        return mean + std * normal

    @staticmethod
    def mode(mean: Tensor) -> Tensor:
        """The action without noise."""
        return mean

    @staticmethod
    def log_prob(mean: Tensor, std: Tensor, action: Tensor) -> Tensor:
        """log-density of `action`, summed over A: [...]."""
        normal = ((action - mean) / std).square() / 2 + std.log() + math.log(2 * math.pi) / 2
        return -normal.sum(-1)

    @staticmethod
    def entropy(std: Tensor) -> Tensor:
        """Entropy summed over A: [...]."""
        return (std.log() + (1 + math.log(2 * math.pi)) / 2).sum(-1)


# -- the first Dreamer's ---------------------------------------------------------------------------


class PlainMLP(MLP):
    """Plain layers with ELU, as the first Dreamer has them; [..., I], or wider with zeros at its
    end, -> [..., O]."""

    def __init__(self, inputs: int, outputs: int, units: int, layers: int):
        super().__init__(inputs, outputs, depth=layers, num_cells=units, activation_class=nn.ELU)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for module in self:
            x = linear(x, module.weight, module.bias) if isinstance(module, nn.Linear) else elu(x)
        return x


class PlainEncoder(nn.Module):
    """[..., O] observations -> [..., U] embedding."""

    def __init__(self, observation: int, units: int, layers: int):
        super().__init__()
        self.net = PlainMLP(observation, units, units, layers)
        self.width = units

    def forward(self, observation: Tensor, pixels: Tensor | None = None) -> Tensor:
        return self.net(observation.to(next(self.parameters()).dtype))


class PlainDecoder(nn.Module):
    """[..., F] features -> [..., O] prediction of the observation."""

    def __init__(self, features: int, observation: int, units: int, layers: int):
        super().__init__()
        self.net = PlainMLP(features, observation, units, layers)

    def forward(self, features: Tensor) -> Tensor:
        return full(self.net(features))

    @staticmethod
    def loss(prediction: Tensor, observation: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Squared error, summed over O: [..., O] -> [...]."""
        return (prediction - observation).square().sum(-1)

    def decode(self, features: Tensor) -> Tensor:
        """[..., F] -> [..., O] in the observation's own units."""
        return self(features)


class ScalarHead(nn.Module):
    """[..., F] features -> [...]: a number, trained by its squared error."""

    def __init__(self, features: int, units: int, layers: int):
        super().__init__()
        self.net = PlainMLP(features, 1, units, layers)

    def forward(self, features: Tensor) -> Tensor:
        return full(self.net(features)).squeeze(-1)


class TanhActor(nn.Module):
    """Normal policy squashed by tanh; std = softplus(. + 5's inverse), at least 1e-4.

    As TorchRL's `DreamerActor` with its `biased_softplus_5.0_0.0001`: a standard deviation of 5
    where the network says 0; and as `TanhNormal(tanh_loc=True)` and the paper's code the mean is
    bounded, `BOUND * tanh(. / BOUND)`: the actor learns through it alone, and one beyond would have
    no gradient to come back by.
    """

    BIAS, MIN_STD, BOUND = 5.0, 1e-4, 5.0

    def __init__(self, features: int, action: int, units: int, layers: int):
        super().__init__()
        self.net = PlainMLP(features, 2 * action, units, layers)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[..., F] -> mean and std before the tanh: [..., A] each."""
        mean, raw = full(self.net(features)).chunk(2, -1)
        shift = math.log(math.expm1(self.BIAS - self.MIN_STD))
        mean = self.BOUND * torch.tanh(mean / self.BOUND)
        return mean, F.softplus(raw + shift) + self.MIN_STD

    @staticmethod
    def sample(mean: Tensor, std: Tensor, normal: Tensor) -> Tensor:
        """The action, in (-1, 1), that `normal` [..., A] leads to."""
        return torch.tanh(mean + std * normal)

    @staticmethod
    def mode(mean: Tensor) -> Tensor:
        """The action without noise."""
        return torch.tanh(mean)
