"""Moonshine as `transformers` publishes it (model_type moonshine)."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from fusion_jax.encoders.moonshine import SHORTEST, Moonshine, MoonshineDecoder, MoonshineEncoder
from fusion_jax.errors import UserError
from fusion_jax.pretrained.checkpoint import CONV1D, LINEAR, Family, Slot
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import Rope

# The config.json of Moonshine Tiny, for weights that come without one.
CONFIG = {
    "model_type": "moonshine",
    "architectures": ["MoonshineForConditionalGeneration"],
    "vocab_size": 32_768,
    "hidden_size": 288,
    "intermediate_size": 1152,
    "encoder_num_hidden_layers": 6,
    "decoder_num_hidden_layers": 6,
    "encoder_num_attention_heads": 8,
    "decoder_num_attention_heads": 8,
    "encoder_num_key_value_heads": 8,
    "decoder_num_key_value_heads": 8,
    "encoder_hidden_act": "gelu",
    "decoder_hidden_act": "silu",
    "partial_rotary_factor": 0.9,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 194,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
}


def _head_dim(config: Mapping) -> int:
    return config["hidden_size"] // config["encoder_num_attention_heads"]


def _rotated(config: Mapping) -> int:
    """How many dims of a head are rotated, always even."""
    rope = config.get("rope_parameters") or config
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.9))
    return int(_head_dim(config) * fraction) // 2 * 2


def _rope(config: Mapping) -> Rope:
    rope = config.get("rope_parameters") or config
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"Moonshine with the rotary positions {rope['rope_type']}: expected default"
        )
    return Rope.plain(_rotated(config), rope.get("rope_theta", 10_000.0))


def build_encoder(config: Mapping) -> MoonshineEncoder:
    """The encoder of a config.json."""
    if config["encoder_hidden_act"] != "gelu" or config["decoder_hidden_act"] != "silu":
        raise UserError("a Moonshine with other activations than gelu and silu")
    heads = config["encoder_num_attention_heads"]
    return MoonshineEncoder(
        width=config["hidden_size"],
        depth=config["encoder_num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("encoder_num_key_value_heads") or heads,
        mlp_width=config["intermediate_size"],
        rope=_rope(config),
        bias=config.get("attention_bias", False),
    )


def build_recogniser(config: Mapping) -> Moonshine:
    """Encoder and decoder of a config.json."""
    heads = config["decoder_num_attention_heads"]
    decoder = MoonshineDecoder(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["decoder_num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("decoder_num_key_value_heads") or heads,
        mlp_width=config["intermediate_size"],
        rope=_rope(config),
        bias=config.get("attention_bias", False),
    )
    return Moonshine(build_encoder(config), decoder)


def encoder_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of the encoder."""
    mapping = {
        "encoder.conv1.weight": Slot("conv1/kernel", CONV1D),
        "encoder.groupnorm.weight": Slot("norm/scale"),
        "encoder.groupnorm.bias": Slot("norm/bias"),
        "encoder.layer_norm.weight": Slot("encoder/final_norm/scale"),
    }
    for conv in ("conv2", "conv3"):
        mapping[f"encoder.{conv}.weight"] = Slot(f"{conv}/kernel", CONV1D)
        mapping[f"encoder.{conv}.bias"] = Slot(f"{conv}/bias")
    for index in range(config["encoder_num_hidden_layers"]):
        theirs, ours = f"encoder.layers.{index}", f"encoder/layer_{index}"
        mapping |= _attention(f"{theirs}.self_attn", f"{ours}/attention", config, rotated=True)
        mapping |= _mlp(f"{theirs}.mlp", f"{ours}/mlp", gated=False)
        mapping[f"{theirs}.input_layernorm.weight"] = Slot(f"{ours}/attention_norm/scale")
        mapping[f"{theirs}.post_attention_layernorm.weight"] = Slot(f"{ours}/mlp_norm/scale")
    return mapping


def recogniser_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of encoder and decoder."""
    mapping = {
        "decoder.embed_tokens.weight": Slot("words/embedding"),
        "decoder.norm.weight": Slot("decoder/final_norm/scale"),
    }
    for index in range(config["decoder_num_hidden_layers"]):
        theirs, ours = f"decoder.layers.{index}", f"decoder/layer_{index}"
        mapping |= _attention(f"{theirs}.self_attn", f"{ours}/attention", config, rotated=True)
        mapping |= _attention(f"{theirs}.encoder_attn", f"{ours}/cross_attention", config)
        mapping |= _mlp(f"{theirs}.mlp", f"{ours}/mlp", gated=True)
        mapping[f"{theirs}.input_layernorm.weight"] = Slot(f"{ours}/attention_norm/scale")
        mapping[f"{theirs}.post_attention_layernorm.weight"] = Slot(
            f"{ours}/cross_attention_norm/scale"
        )
        mapping[f"{theirs}.final_layernorm.weight"] = Slot(f"{ours}/mlp_norm/scale")
    inside_decoder = {name: slot.under("decoder") for name, slot in mapping.items()}
    inside_encoder = {n: slot.under("encoder") for n, slot in encoder_slots(config).items()}
    return inside_encoder | inside_decoder


def _attention(
    theirs: str, ours: str, config: Mapping, *, rotated: bool = False
) -> dict[str, Slot]:
    mapping = {f"{theirs}.o_proj.weight": Slot(f"{ours}/out/kernel", LINEAR)}
    for published, name in {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.items():
        order = _halves_first(config) if rotated and name != "value" else None
        mapping[f"{theirs}.{published}.weight"] = Slot(f"{ours}/{name}/kernel", LINEAR, order)
        if config.get("attention_bias", False):
            mapping[f"{theirs}.{published}.bias"] = Slot(f"{ours}/{name}/bias", None, order)
    return mapping


def _mlp(theirs: str, ours: str, *, gated: bool) -> dict[str, Slot]:
    first = ("up", "gate") if gated else ("up",)
    return {
        f"{theirs}.fc1.weight": Slot(tuple(f"{ours}/{name}/kernel" for name in first), LINEAR),
        f"{theirs}.fc1.bias": Slot(tuple(f"{ours}/{name}/bias" for name in first)),
        f"{theirs}.fc2.weight": Slot(f"{ours}/down/kernel", LINEAR),
        f"{theirs}.fc2.bias": Slot(f"{ours}/down/bias"),
    }


def _halves_first(config: Mapping) -> tuple[int, ...]:
    """Moonshine rotates neighbouring dims of a head (0 with 1), we the first half with the second.

    The order of dims inside query and key is free as long as it is the same in both.
    """
    head_dim, rotated = _head_dim(config), _rotated(config)
    head = np.arange(head_dim)
    head[:rotated] = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2)])
    starts = np.arange(0, config["hidden_size"], head_dim)
    return tuple((starts[:, None] + head[None]).reshape(-1).tolist())


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of Moonshine's own tokenizer.bin: every piece after its length.

    The pieces are SentencePiece BPE: 256 single bytes after the three marks, then merged pieces in
    the order in which they were merged, which gives the merges back, then unused marks.
    """
    data, pieces, position = path.read_bytes(), [], 0
    while position < len(data):
        size = data[position]
        position += 1
        if size > 127:
            size = size - 128 + data[position] * 128
            position += 1
        pieces.append(data[position : position + size])
        position += size
    names = [piece.decode(errors="replace") for piece in pieces]
    names[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
    names = [name or f"<empty_{index}>" for index, name in enumerate(names)]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = []
    for name in names[259:]:
        splits = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        merges += sorted(known, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    marks = [name for name in names if name in names[:3] or name.startswith("<<ST_")]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return tokenizer


def encoder_inputs(config: Mapping) -> tuple[Tokens]:
    """The shortest recording, to shape the params."""
    return (Tokens(jnp.zeros((1, SHORTEST)), jnp.ones((1, SHORTEST), bool)),)


def recogniser_inputs(config: Mapping) -> tuple[Tokens, Tokens]:
    """A recording and a token, to shape the params."""
    return *encoder_inputs(config), Tokens(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))


ENCODER = Family(
    build=build_encoder,
    slots=encoder_slots,
    inputs=encoder_inputs,
    prefix="model.",
    ignore=lambda name: name.startswith(("decoder.", "proj_out.")) or "rotary_emb" in name,
)
RECOGNISER = Family(
    build=build_recogniser,
    slots=recogniser_slots,
    inputs=recogniser_inputs,
    prefix="model.",
    ignore=lambda name: name.startswith("proj_out.") or "rotary_emb" in name,
)
