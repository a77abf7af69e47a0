"""EfficientNet-Lite: a small picture encoder trained on ImageNet, for laptops and phones.

EfficientNet (https://arxiv.org/abs/1905.11946) without squeeze-excitation, with ReLU6, and with
stem and head of fixed width. Batch norms are folded into the convolutions before them, so there
are no running statistics: what is frozen and what is fine-tuned are plain kernels and biases.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.platforms import by_platform
from fusion_jax.tokens import Tokens, fill

# Kernel size, stride of the first, expansion, channels, repeats of each stage of Lite0.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a variant grows Lite0, and the side of the square pictures it was trained on."""

    width: float
    depth: float
    image_size: int


LITE = (
    Scaling(1.0, 1.0, 224),
    Scaling(1.0, 1.1, 240),
    Scaling(1.1, 1.2, 260),
    Scaling(1.2, 1.4, 280),
    Scaling(1.4, 1.8, 300),
)


class BlockSetting(NamedTuple):
    """One block of a variant."""

    features: int
    kernel: int
    stride: int
    expansion: int


def block_settings(variant: int) -> list[BlockSetting]:
    """The blocks of Lite0 to Lite4, from the picture to the head."""
    scaling = LITE[variant]
    blocks = []
    for index, (kernel, stride, expansion, channels, repeats) in enumerate(STAGES):
        features = _round_to_8(channels * scaling.width)
        if 0 < index < len(STAGES) - 1:  # the first and the last stage are not repeated
            repeats = math.ceil(repeats * scaling.depth)
        blocks.append(BlockSetting(features, kernel, stride, expansion))
        blocks += [BlockSetting(features, kernel, 1, expansion)] * (repeats - 1)
    return blocks


class Conv(nn.Module):
    """A convolution with SAME padding and a bias; channels last. 1 x 1 is a matrix product."""

    features: int
    kernel: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, h / stride, w / stride, features]"""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.kernel == 1:
            return jnp.einsum("bhwc,cf->bhwf", x, kernel[0, 0]) + bias[None, None, None]
        strides = (self.stride, self.stride)
        out = jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out + bias[None, None, None]


class DepthwiseConv(nn.Module):
    """One k x k filter per channel, SAME padding, and a bias."""

    kernel: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, h / stride, w / stride, c]"""
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        init = nn.initializers.he_normal(in_axis=(0, 1), out_axis=3)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:]).astype(self.dtype)
        out = by_platform(
            x,
            kernel,
            cpu=partial(depthwise_by_shifts, stride=self.stride),
            default=partial(depthwise_by_groups, stride=self.stride),
        )
        return out + bias[None, None, None]


def depthwise_by_groups(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Depthwise convolution as accelerators do it well. x: [b, h, w, c], kernel: [k, k, 1, c]."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_by_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same as k x k shifted products: on CPU, XLA's grouped convolution is 12 times slower."""
    height, width = (-(-side // stride) for side in x.shape[1:3])
    return _sum_of_shifts(_padded(x, kernel.shape[0], stride), kernel, height, width, stride)


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple]:
    return depthwise_by_shifts(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Written out, since the derivative of k x k slices is as many padded copies of the picture."""
    x, kernel = saved
    size = kernel.shape[0]
    height, width = gradient.shape[1:3]
    padded = _padded(x, size, stride)

    def for_place(place: jax.Array) -> jax.Array:
        seen = _shift(padded, place // size, place % size, height, width, stride)
        return (seen * gradient).sum(axis=(0, 1, 2))

    # A loop: XLA's CPU code for all sums at once takes 4 times as long, and longer to compile.
    for_kernel = jax.lax.map(for_place, jnp.arange(size**2)).reshape(kernel.shape)
    edges = [(0, 0, 0)]
    for side, out in zip(x.shape[1:3], (height, width), strict=True):
        before = size - 1 - _margins(side, size, stride)[0]
        spread = (out - 1) * stride + 1
        edges.append((before, side + size - 1 - before - spread, stride - 1))
    spread_out = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [*edges, (0, 0, 0)])
    for_x = _sum_of_shifts(spread_out, kernel[::-1, ::-1], *x.shape[1:3], stride=1)
    return for_x, for_kernel


depthwise_by_shifts.defvjp(_forward, _backward)


def _sum_of_shifts(
    x: jax.Array, kernel: jax.Array, height: int, width: int, stride: int
) -> jax.Array:
    shifts = [
        _shift(x, i, j, height, width, stride) * kernel[i, j][None, None]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return sum(shifts[1:], start=shifts[0])


def _shift(
    x: jax.Array, i: int | jax.Array, j: int | jax.Array, height: int, width: int, stride: int
) -> jax.Array:
    """What the place (i, j) of a kernel sees at each place of the output."""
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    x = jax.lax.dynamic_slice_in_dim(x, i, rows, axis=1)
    return jax.lax.dynamic_slice_in_dim(x, j, columns, axis=2)[:, ::stride, ::stride]


def _padded(x: jax.Array, size: int, stride: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), *(_margins(side, size, stride) for side in x.shape[1:3]), (0, 0)])


def _margins(side: int, size: int, stride: int) -> tuple[int, int]:
    """SAME padding before and after."""
    total = max((-(-side // stride) - 1) * stride + size - side, 0)
    return total // 2, total - total // 2


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel, narrow; with a residual where the shape allows it."""

    features: int
    kernel: int
    stride: int
    expansion: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, h / stride, w / stride, features]"""
        inputs = x
        if self.expansion != 1:
            wide = x.shape[-1] * self.expansion
            x = nn.relu6(Conv(wide, 1, dtype=self.dtype, name="expand")(x))
        depthwise = DepthwiseConv(self.kernel, self.stride, self.dtype, name="depthwise")
        x = nn.relu6(depthwise(x))
        x = Conv(self.features, 1, dtype=self.dtype, name="project")(x)
        return x + inputs if inputs.shape == x.shape else x


class EfficientNetLite(nn.Module):
    """Pictures -> the feature map before pooling, one token per place.

    Pictures are RGB in 0..1 and are normalised here as in training, (255 x - 127) / 128. The
    published weights saw squares of `LITE[variant].image_size`; any size gives a map of 1/32.

    Attributes:
        variant: 0 to 4, a row of `LITE`.
        classes: how many `classify` tells apart, 1,000 for ImageNet; None means no classifier.
    """

    variant: int = 2
    classes: int | None = None
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        conv = partial(Conv, dtype=self.dtype)
        self.stem = conv(32, 3, 2)
        settings = block_settings(self.variant)
        self.blocks = [InvertedBottleneck(*setting, self.dtype) for setting in settings]
        self.head = conv(1280, 1)
        if self.classes is not None:
            self.classifier = nn.Dense(self.classes, dtype=self.dtype)

    def __call__(self, images: Tokens, train: bool = False) -> Tokens:
        """Tokens [b, h, w, 3], mask [b] -> Tokens [b, (h / 32) (w / 32), 1280]."""
        del train
        tokens = self._features(images)
        if self.is_initializing() and self.classes is not None:
            self.classifier(tokens.values[:, 0])
        return tokens

    def classify(self, images: Tokens) -> jax.Array:
        """ImageNet logits, [b, classes], from the mean over places."""
        return self.classifier(self._features(images).values.mean(axis=1))

    def _features(self, images: Tokens) -> Tokens:
        x = ((fill(images) * 255.0 - 127.0) / 128.0).astype(self.dtype)
        x = nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = rearrange(nn.relu6(self.head(x)), "b h w d -> b (h w) d")
        return Tokens(x, jnp.broadcast_to(images.mask[:, None], x.shape[:2]))


def _round_to_8(channels: float) -> int:
    """The nearest multiple of 8, never more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
