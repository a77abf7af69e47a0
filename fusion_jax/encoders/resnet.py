"""A small residual network with group norm, so that it has no running state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, fill


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, pre-activation (https://arxiv.org/abs/1603.05027)."""

    channels: int
    stride: int = 1
    groups: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), channels]"""

        def activate(inputs: jax.Array, name: str) -> jax.Array:
            return nn.relu(nn.GroupNorm(self.groups, dtype=self.dtype, name=name)(inputs))

        def conv(size: int, stride: int, name: str) -> nn.Conv:
            return nn.Conv(
                self.channels,
                (size, size),
                (stride, stride),
                use_bias=False,
                dtype=self.dtype,
                name=name,
            )

        inputs = activate(hidden, "norm_1")
        if hidden.shape[-1] != self.channels or self.stride != 1:
            hidden = conv(1, self.stride, "shortcut")(inputs)
        branch = conv(3, self.stride, "conv_1")(inputs)
        return hidden + conv(3, 1, "conv_2")(activate(branch, "norm_2"))


class ResNet(nn.Module):
    """ResNet with group norm (https://arxiv.org/abs/1512.03385, https://arxiv.org/abs/1803.08494).

    Attributes:
        width: of the tokens that come out.
        stages: number of blocks per stage; each stage after the first halves the picture and
            doubles the channels.
        channels: of the first stage, a multiple of `groups`.
        stem_stride: of the first convolution.
        groups: of the group norms.
        dropout: rate on the last feature map.
    """

    width: int = 192
    stages: tuple[int, ...] = (1, 1, 1, 1)
    channels: int = 32
    stem_stride: int = 2
    groups: int = 8
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, picture: Tokens, train: bool = False) -> Tokens:
        """Pictures [b, h, w, 3] in 0..1, mask [b] -> Tokens [b, h' w', width]."""
        if picture.values.ndim != 4:
            raise UserError(
                f"pictures must be [batch, height, width, 3] and were {picture.values.shape}"
            )
        stride = (self.stem_stride, self.stem_stride)
        hidden = nn.Conv(self.channels, (3, 3), stride, dtype=self.dtype, name="stem")(
            fill(picture).astype(self.dtype) * 2 - 1
        )
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                hidden = ResidualBlock(
                    channels=self.channels * 2**stage,
                    stride=2 if stage and not block else 1,
                    groups=self.groups,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{block}",
                )(hidden)
        hidden = nn.relu(nn.GroupNorm(self.groups, dtype=self.dtype, name="norm")(hidden))
        hidden = rearrange(hidden, "b y x c -> b (y x) c")
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        hidden = nn.Dense(self.width, dtype=self.dtype, name="out")(hidden)
        return Tokens(hidden, repeat(picture.mask, "b -> b t", t=hidden.shape[1]))
