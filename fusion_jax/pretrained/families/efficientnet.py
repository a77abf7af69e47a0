"""EfficientNet-Lite as the `efficientnet_lite_pytorch` package publishes it."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from fusion_jax.encoders.efficientnet import EfficientNetLite, block_settings
from fusion_jax.pretrained.checkpoint import CONV2D, LINEAR, Family, Slot
from fusion_jax.tokens import Tokens

BATCH_NORM_EPSILON = 1e-3


def build_encoder(config: Mapping) -> EfficientNetLite:
    """The feature extractor of a config.json (`variant` 0 to 4)."""
    return EfficientNetLite(variant=config["variant"])


def build_classifier(config: Mapping) -> EfficientNetLite:
    """The same with the classifier on top (`num_classes`)."""
    return EfficientNetLite(variant=config["variant"], classes=config["num_classes"])


def inputs(config: Mapping) -> tuple[Tokens]:
    """One small picture, to shape the params."""
    return (Tokens(jnp.zeros((1, 32, 32, 3)), jnp.ones((1,), bool)),)


def encoder_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> our param; the names are PyTorch's, with the batch norms folded."""
    modules = {"_conv_stem": "stem", "_conv_head": "head"}
    for index, block in enumerate(block_settings(config["variant"])):
        for conv in ("expand", "depthwise", "project"):
            if conv != "expand" or block.expansion != 1:
                modules[f"_blocks.{index}._{conv}_conv"] = f"blocks_{index}/{conv}"
    mapping = {}
    for theirs, ours in modules.items():
        mapping[f"{theirs}.weight"] = Slot(f"{ours}/kernel", CONV2D)
        mapping[f"{theirs}.bias"] = Slot(f"{ours}/bias")
    return mapping


def classifier_slots(config: Mapping) -> dict[str, Slot]:
    """The same with the classifier."""
    classifier = {"_fc.weight": Slot("classifier/kernel", LINEAR)}
    return encoder_slots(config) | classifier | {"_fc.bias": Slot("classifier/bias")}


def fold_batch_norms(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A published state dict with each batch norm multiplied into the convolution before it.

    Computed in float64, so that the fold itself costs no precision.
    """
    norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    norms |= {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    folded = {}
    for name, weight in tensors.items():
        *scope, conv = name.removesuffix(".weight").split(".")
        if conv in norms:
            norm = ".".join([*scope, norms[conv]])
            gain, offset, mean, variance = (
                tensors[f"{norm}.{part}"].astype(np.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            gain /= np.sqrt(variance + BATCH_NORM_EPSILON)
            folded[name] = (weight * gain[:, None, None, None]).astype(np.float32)
            folded[name.removesuffix("weight") + "bias"] = (offset - mean * gain).astype(np.float32)
    return folded | {name: tensors[name] for name in ("_fc.weight", "_fc.bias")}


ENCODER = Family(build_encoder, encoder_slots, inputs, ignore=lambda name: name.startswith("_fc."))
CLASSIFIER = Family(build_classifier, classifier_slots, inputs)
