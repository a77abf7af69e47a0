"""Gemma 2 (https://arxiv.org/abs/2408.00118) and the text model of Gemma 3 (arXiv 2503.19786).

Norms on both sides of each branch, published as scale minus one; local and global layers by turns.
"""

from collections.abc import Mapping
from functools import partial

from fusion_jax.language.decoder import Decoder
from fusion_jax.norm import RMSNorm
from fusion_jax.pretrained.checkpoint import Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.transformer import MLP, Attention, Block

COMMON = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
DEFAULTS = {  # what a config.json may leave out, by family
    "gemma2": COMMON
    | {
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": COMMON
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
    },
}
LOCAL = "sliding_attention"


def build(config: Mapping) -> Decoder:
    """The module of a config.json."""
    config = DEFAULTS[config["model_type"]] | dict(config)
    third = config["model_type"] == "gemma3_text"
    norm = partial(RMSNorm, epsilon=config["rms_norm_eps"])
    attention = partial(
        Attention,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        bias=config["attention_bias"],
        out_bias=config["attention_bias"],
        head_norm=norm if third else None,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        softcap=None if third else config["attn_logit_softcapping"],
    )
    mlp = partial(
        MLP,
        hidden_width=config["intermediate_size"],
        activation=settings.activation(config["hidden_activation"] or "gelu_pytorch_tanh"),
        gated=True,
        bias=False,
    )
    block = partial(Block, mlp=mlp, norm=norm, branch_norm=True)
    kinds = {
        kind: partial(
            block,
            attention=partial(
                attention,
                window=config["sliding_window"] if kind == LOCAL else None,
                rope=_rope(config, kind),
            ),
        )
        for kind in (LOCAL, "full_attention")
    }
    return Decoder(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        blocks=tuple(kinds[kind] for kind in _layer_types(config)),
        final_norm=norm,
        embedding_scale=config["hidden_size"] ** 0.5,
        context_length=config["max_position_embeddings"],
        tied=config["tie_word_embeddings"],
        logit_softcap=config["final_logit_softcapping"],
    )


def slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> our param."""
    config = DEFAULTS[config["model_type"]] | dict(config)
    norm = partial(settings.norm, offset=1.0)
    mapping = {"embed_tokens.weight": Slot("embedding/embedding")}
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_branch_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_branch_norm",
    }
    if config["model_type"] == "gemma3_text":
        norms |= {"self_attn.q_norm": "attention/query_norm"}
        norms |= {"self_attn.k_norm": "attention/key_norm"}
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"layers.{index}", f"transformer/layer_{index}"
        for name, path in norms.items():
            mapping |= norm(f"{theirs}.{name}", f"{ours}/{path}")
        for name, path in attention.items():
            bias = config["attention_bias"]
            mapping |= settings.linear(
                f"{theirs}.self_attn.{name}", f"{ours}/attention/{path}", bias
            )
        for name in ("gate", "up", "down"):
            mapping |= settings.linear(f"{theirs}.mlp.{name}_proj", f"{ours}/mlp/{name}", False)
    mapping |= norm("norm", "transformer/final_norm")
    if not config["tie_word_embeddings"]:
        mapping |= settings.linear("lm_head", "head", False)
    return mapping


def _layer_types(config: Mapping) -> list[str]:
    period = config["sliding_window_pattern"] or 1
    return config.get("layer_types") or [
        LOCAL if (index + 1) % period else "full_attention"
        for index in range(config["num_hidden_layers"])
    ]


def _rope(config: Mapping, kind: str) -> object:
    """Gemma 3 turns local layers faster than global ones, and stretches only the latter."""
    if config["model_type"] == "gemma2":
        return settings.rotary(config, config["head_dim"])
    if kind == LOCAL and not config.get("rope_parameters"):
        theta = config.get("rope_local_base_freq") or 10_000.0
        return settings.rotary({"rope_theta": theta}, config["head_dim"])
    theta = 10_000.0 if kind == LOCAL else 1_000_000.0
    return settings.rotary(config, config["head_dim"], kind, theta)


LANGUAGE_MODEL = Family(
    build=build,
    slots=slots,
    inputs=settings.text,
    prefix="model.",
    outside=("lm_head.",),
    ignore=lambda name: name == "lm_head.weight" or "rotary_emb" in name,
)
