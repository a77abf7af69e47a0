"""BERT-like checkpoints as `transformers` has them (model_type bert: BERT, MiniLM, E5, BGE)."""

from collections.abc import Mapping

import jax.numpy as jnp

from fusion_jax.encoders.bert import Bert
from fusion_jax.errors import UserError
from fusion_jax.pretrained.checkpoint import LINEAR, Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.tokens import Tokens


def build(config: Mapping) -> Bert:
    """The module of a config.json."""
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(f"BERT with {kind} positions: expected absolute ones")
    return Bert(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        segments=config["type_vocab_size"],
        norm_epsilon=config["layer_norm_eps"],
        activation=settings.activation(config["hidden_act"]),
        dropout=config["hidden_dropout_prob"],
    )


def slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> our param."""
    mapping = {
        "embeddings.word_embeddings.weight": Slot("words/embedding"),
        "embeddings.position_embeddings.weight": Slot("positions/embedding"),
        "embeddings.token_type_embeddings.weight": Slot("segments/embedding"),
    }
    norms = {"embeddings.LayerNorm": "norm"}
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"encoder.layer.{index}", f"encoder/layer_{index}"
        norms[f"{theirs}.attention.output.LayerNorm"] = f"{ours}/attention_post_norm"
        norms[f"{theirs}.output.LayerNorm"] = f"{ours}/mlp_post_norm"
        linears = {
            f"{theirs}.attention.self.query": f"{ours}/attention/query",
            f"{theirs}.attention.self.key": f"{ours}/attention/key",
            f"{theirs}.attention.self.value": f"{ours}/attention/value",
            f"{theirs}.attention.output.dense": f"{ours}/attention/out",
            f"{theirs}.intermediate.dense": f"{ours}/mlp/up",
            f"{theirs}.output.dense": f"{ours}/mlp/down",
        }
        for published, path in linears.items():
            mapping[f"{published}.weight"] = Slot(f"{path}/kernel", LINEAR)
            mapping[f"{published}.bias"] = Slot(f"{path}/bias")
    for published, path in norms.items():
        mapping[f"{published}.weight"] = Slot(f"{path}/scale")
        mapping[f"{published}.bias"] = Slot(f"{path}/bias")
    return mapping


def inputs(config: Mapping) -> tuple[Tokens]:
    """One short text, to shape the params."""
    return (Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),)


ENCODER = Family(
    build=build,
    slots=slots,
    inputs=inputs,
    prefix="bert.",
    ignore=lambda name: name.startswith(("pooler.", "cls.")) or name.endswith("position_ids"),
    older={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)
