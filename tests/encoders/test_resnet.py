"""The residual network against PyTorch's layers on the same params."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from fusion_jax.encoders.resnet import ResidualBlock, ResNet
from fusion_jax.tokens import Tokens


def test_block_equals_torch():
    block = ResidualBlock(channels=16, stride=2, groups=4)
    hidden = np.random.default_rng(0).normal(size=(2, 9, 9, 8)).astype(np.float32)
    params = jax.jit(block.init)(jax.random.key(0), jnp.asarray(hidden))
    p = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf)), params["params"])

    def activate(x, name):
        return F.relu(F.group_norm(x, 4, p[name]["scale"], p[name]["bias"], eps=1e-6))

    def conv(x, name, stride, padding):
        return F.conv2d(x, p[name]["kernel"].permute(3, 2, 0, 1), None, stride, padding)

    x = torch.tensor(hidden).permute(0, 3, 1, 2)
    inputs = activate(x, "norm_1")
    branch = conv(activate(conv(inputs, "conv_1", 2, 1), "norm_2"), "conv_2", 1, 1)
    expected = (conv(inputs, "shortcut", 2, 0) + branch).permute(0, 2, 3, 1)
    found = jax.jit(block.apply)(params, jnp.asarray(hidden))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_each_stage_after_the_first_halves_the_picture():
    picture = Tokens(jnp.ones((1, 32, 48, 3)), jnp.ones(1, bool))
    model = ResNet(8, stages=(1, 2, 1), channels=8)
    tokens = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), picture)[0])
    assert tokens.values.shape == (1, 4 * 6, 8) and tokens.mask.shape == (1, 4 * 6)
