"""GPT-2: learned positions, layer norms, plain MLPs, weights published as [in, out]."""

from collections.abc import Mapping
from functools import partial

from fusion_jax.language.decoder import Decoder
from fusion_jax.norm import LayerNorm
from fusion_jax.pretrained.checkpoint import Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.transformer import MLP, Attention, Block


def build(config: Mapping) -> Decoder:
    """The module of a config.json."""
    width, heads = config["n_embd"], config["n_head"]
    norm = partial(LayerNorm, epsilon=config.get("layer_norm_epsilon", 1e-5))
    scale = (width // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
    attention = partial(Attention, heads=heads, scale=scale)
    mlp = partial(
        MLP,
        hidden_width=config.get("n_inner") or 4 * width,
        activation=settings.activation(config.get("activation_function", "gelu_new")),
    )
    block = partial(Block, attention=attention, mlp=mlp, norm=norm)
    blocks = (block,) * config["n_layer"]
    if config.get("scale_attn_by_inverse_layer_idx", False):
        blocks = tuple(
            partial(block, attention=partial(attention, scale=scale / (index + 1)))
            for index in range(config["n_layer"])
        )
    return Decoder(
        vocabulary=config["vocab_size"],
        width=width,
        blocks=blocks,
        final_norm=norm,
        context_length=config["n_positions"],
        learned_positions=True,
        tied=config.get("tie_word_embeddings", True),
    )


def slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> our param."""
    norm = partial(settings.norm, bias=True)
    mapping = {
        "wte.weight": Slot("embedding/embedding"),
        "wpe.weight": Slot("positions/embedding"),
    }
    for index in range(config["n_layer"]):
        theirs, ours = f"h.{index}", f"transformer/layer_{index}"
        mapping |= norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
        mapping |= norm(f"{theirs}.ln_2", f"{ours}/mlp_norm")
        together = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
        dense = {
            "attn.c_attn": together,
            "attn.c_proj": [f"{ours}/attention/out"],
            "mlp.c_fc": [f"{ours}/mlp/up"],
            "mlp.c_proj": [f"{ours}/mlp/down"],
        }
        for name, paths in dense.items():
            kernels = tuple(f"{path}/kernel" for path in paths)
            mapping[f"{theirs}.{name}.weight"] = Slot(kernels, axis=1)
            mapping[f"{theirs}.{name}.bias"] = Slot(tuple(f"{path}/bias" for path in paths))
    mapping |= norm("ln_f", "transformer/final_norm")
    if not config.get("tie_word_embeddings", True):
        mapping |= settings.linear("lm_head", "head", False)
    return mapping


LANGUAGE_MODEL = Family(
    build=build,
    slots=slots,
    inputs=settings.text,
    prefix="transformer.",
    outside=("lm_head.",),
    ignore=lambda name: name == "lm_head.weight" or name.endswith((".attn.bias", "masked_bias")),
)
