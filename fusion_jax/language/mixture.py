"""Mixture of experts: each token goes through the few MLPs that a router picks for it."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.rows import each_share


class Mixture(nn.Module):
    """Gated MLPs of which every token uses `chosen` (https://arxiv.org/abs/2101.03961).

    No token is dropped: tokens are sorted by expert and multiplied by ragged groups. Experts are
    split over the mesh's axis `tensor`: a device sends its tokens, which are the same along that
    axis, through its own experts, and what they give is added up. So kernels stay where they are,
    except that those of the own experts are gathered over `fsdp` like any layer's. The router's
    logits are sown as `router_logits` among the intermediates for `load_balancing_loss`.

    Attributes:
        experts, chosen: how many MLPs there are, and how many a token goes through.
        hidden_width: of each MLP.
        normalize: whether the weights of the chosen ones sum to one.
    """

    experts: int
    chosen: int
    hidden_width: int
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    normalize: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, t, width]"""
        width = hidden.shape[-1]
        router = nn.Dense(self.experts, use_bias=False, dtype=self.dtype, name="router")
        logits = router(hidden).astype(jnp.float32)
        self.sow("intermediates", "router_logits", logits)

        def kernel(name: str, fan_in: int, fan_out: int) -> jax.Array:
            init = nn.initializers.lecun_normal(batch_axis=0)
            return self.param(name, init, (self.experts, fan_in, fan_out)).astype(self.dtype)

        kernels = (
            kernel("gate", width, self.hidden_width),
            kernel("up", width, self.hidden_width),
            kernel("down", self.hidden_width, width),
        )
        return each_share(self._mixed, (hidden, logits), kernels)

    def _mixed(
        self,
        first: jax.Array,
        hidden: jax.Array,
        logits: jax.Array,
        gate: jax.Array,
        up: jax.Array,
        down: jax.Array,
    ) -> jax.Array:
        """What the experts from `first` on, whose kernels are given, add to the output.

        hidden [b, t, d] goes through those that the router's logits [b, t, e] choose.
        """
        weights, picked = jax.lax.top_k(jax.nn.softmax(logits), self.chosen)
        if self.normalize:
            weights /= weights.sum(axis=-1, keepdims=True)
        # one row per token and expert of it, sorted so that each expert's rows are together and
        # those of the experts that are not here come last
        batch, picked = hidden.shape[0], (picked.reshape(-1) - first) % self.experts
        order = jnp.argsort(picked)
        here = gate.shape[0]
        sizes = jnp.bincount(picked, length=self.experts)[:here].astype(jnp.int32)
        mine = (jnp.arange(picked.size) < sizes.sum())[:, None]

        def own(rows: jax.Array) -> jax.Array:
            """Rows beyond all groups are undefined in a ragged product, and in its gradient."""
            return rows if here == self.experts else jnp.where(mine, rows, 0)

        tokens = rearrange(hidden, "b t d -> (b t) d").astype(self.dtype)
        tokens = own(tokens[order // self.chosen])
        inner = self.activation(jax.lax.ragged_dot(tokens, gate, sizes))
        inner *= jax.lax.ragged_dot(tokens, up, sizes)
        out = own(jax.lax.ragged_dot(inner, down, sizes))[jnp.argsort(order)]
        out = rearrange(out, "(b t k) d -> b t k d", b=batch, k=self.chosen)
        return (out * weights[..., None].astype(out.dtype)).sum(axis=2)


def load_balancing_loss(intermediates: Mapping, mask: jax.Array, chosen: int) -> jax.Array:
    """How uneven the choices of all routers together are; `chosen` when they are even.

    Equations 4 to 6 of https://arxiv.org/abs/2101.03961, over real tokens.

    Args:
        intermediates: what `apply(..., mutable=["intermediates"])` gave under that name.
        mask: bool [b, t], True where a token is real.
        chosen: how many experts a token goes through.
    """
    found = jax.tree_util.tree_leaves_with_path(intermediates)
    logits = [leaf for path, leaf in found if "router_logits" in jax.tree_util.keystr(path)]
    if not logits:
        raise ValueError("no router_logits among the intermediates: the model has no Mixture")
    experts = logits[0].shape[-1]
    layers = [leaf.reshape(-1, *mask.shape, experts) for leaf in logits]
    probabilities = jax.nn.softmax(jnp.concatenate(layers))  # [layers, b, t, experts]
    _, picked = jax.lax.top_k(probabilities, chosen)
    real = mask.astype(jnp.float32)[None, :, :, None]
    count = real.sum() * probabilities.shape[0]
    used = (jax.nn.one_hot(picked, experts).sum(axis=3) * real).sum(axis=(0, 1, 2)) / count
    share = (probabilities * real).sum(axis=(0, 1, 2)) / count
    return experts * (used * share).sum()
