"""Llama 3 (and SmolLM2), Mistral, Qwen 2 and 2.5, Qwen 3 dense and mixture.

One recipe: RMS norm before each branch, rotary positions, grouped key heads, a gated MLP. They
differ in biases, in norms over heads, in windows and in that some MLPs are mixtures.
"""

from collections.abc import Mapping
from functools import partial

from fusion_jax.language.decoder import Decoder
from fusion_jax.language.mixture import Mixture
from fusion_jax.norm import RMSNorm
from fusion_jax.pretrained.checkpoint import LINEAR, Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.transformer import MLP, Attention, Block

DEFAULTS = {  # what a config.json may leave out, by family
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_window_layers": 28},
    "qwen3": {"head_dim": 128, "max_window_layers": 28},
    "qwen3_moe": {"decoder_sparse_step": 1, "norm_topk_prob": False},
}


def build(config: Mapping) -> Decoder:
    """The module of a config.json."""
    config = DEFAULTS[config["model_type"]] | dict(config)
    epsilon = config.get("rms_norm_eps", 1e-6)
    norm = partial(RMSNorm, epsilon=epsilon)
    head_dim = _head_dim(config)
    attention = partial(
        Attention,
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads"),
        head_dim=head_dim,
        bias=_has_bias(config, "qkv"),
        out_bias=_has_bias(config, "out"),
        head_norm=norm if _has_head_norm(config) else None,
        rope=settings.rotary(config, head_dim),
    )
    activation = settings.activation(config.get("hidden_act", "silu"))
    mlp = partial(
        MLP,
        hidden_width=config["intermediate_size"],
        activation=activation,
        gated=True,
        bias=config.get("mlp_bias", False),
    )
    kinds = {}  # equal layers share one factory, so that they can be scanned
    blocks = []
    for index, window in enumerate(_windows(config)):
        sparse = _is_sparse(config, index)
        if (window, sparse) not in kinds:
            mixture = partial(
                Mixture,
                experts=_experts(config),
                chosen=config.get("num_experts_per_tok", 8),
                hidden_width=config.get("moe_intermediate_size"),
                activation=activation,
                normalize=config.get("norm_topk_prob", False),
            )
            kinds[window, sparse] = partial(
                Block,
                attention=partial(attention, window=window),
                mlp=mixture if sparse else mlp,
                norm=norm,
            )
        blocks.append(kinds[window, sparse])
    return Decoder(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        blocks=tuple(blocks),
        final_norm=norm,
        context_length=config.get("max_position_embeddings"),
        tied=config.get("tie_word_embeddings", False),
    )


def slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> our param."""
    config = DEFAULTS[config["model_type"]] | dict(config)
    mapping = {"embed_tokens.weight": Slot("embedding/embedding")}
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"layers.{index}", f"transformer/layer_{index}"
        mapping |= settings.norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
        mapping |= settings.norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm")
        for name, projection in projections.items():
            bias = _has_bias(config, "out" if name == "o_proj" else "qkv")
            path = f"{ours}/attention/{projection}"
            mapping |= settings.linear(f"{theirs}.self_attn.{name}", path, bias)
        if _has_head_norm(config):
            for name, path in {"q_norm": "query_norm", "k_norm": "key_norm"}.items():
                mapping |= settings.norm(f"{theirs}.self_attn.{name}", f"{ours}/attention/{path}")
        if _is_sparse(config, index):
            mapping |= settings.linear(f"{theirs}.mlp.gate", f"{ours}/mlp/router", False)
        for name in ("gate", "up", "down"):
            if _is_sparse(config, index):
                for row in range(_experts(config)):
                    expert = f"{theirs}.mlp.experts.{row}.{name}_proj.weight"
                    mapping[expert] = Slot(f"{ours}/mlp/{name}", LINEAR, row=(row,))
            else:
                bias = config.get("mlp_bias", False)
                mapping |= settings.linear(f"{theirs}.mlp.{name}_proj", f"{ours}/mlp/{name}", bias)
    mapping |= settings.norm("norm", "transformer/final_norm")
    if not config.get("tie_word_embeddings", False):
        mapping |= settings.linear("lm_head", "head", False)
    return mapping


def _head_dim(config: Mapping) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _has_bias(config: Mapping, where: str) -> bool:
    if config["model_type"] == "qwen2":
        return where == "qkv"
    return config.get("attention_bias", False)


def _has_head_norm(config: Mapping) -> bool:
    return config["model_type"] in ("qwen3", "qwen3_moe")


def _experts(config: Mapping) -> int | None:
    return config.get("num_experts") or config.get("num_local_experts")


def _is_sparse(config: Mapping, index: int) -> bool:
    if config["model_type"] != "qwen3_moe" or index in (config.get("mlp_only_layers") or ()):
        return False
    return (index + 1) % config["decoder_sparse_step"] == 0


def _windows(config: Mapping) -> list[int | None]:
    """Per layer, how far it looks; None means everywhere."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if config["model_type"] == "mistral":
        return [window] * layers
    if config["model_type"] == "llama" or not config.get("use_sliding_window", False):
        return [None] * layers
    if config["model_type"] == "qwen3_moe":
        return [window] * layers
    types = config.get("layer_types")
    if types:
        return [window if kind == "sliding_attention" else None for kind in types]
    return [window if index >= config["max_window_layers"] else None for index in range(layers)]


LANGUAGE_MODEL = Family(
    build=build,
    slots=slots,
    inputs=settings.text,
    prefix="model.",
    outside=("lm_head.",),
    ignore=lambda name: name == "lm_head.weight" or "rotary_emb" in name,
)
