"""The small models of `parity`: for every family, each of its options is on in some case."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from einops import rearrange

from fusion_jax.attention import self_mask
from fusion_jax.tokens import Tokens

VOCABULARY = 61
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One small model.

    Attributes:
        model: its class in `transformers`, built from `config`.
        theirs: (model, batch of tensors) -> outputs [..., n].
        ours: (module, variables, batch) -> the same outputs.
        batch: name -> array.
        part: which part of the checkpoint is opened.
    """

    model: type[transformers.PreTrainedModel]
    config: transformers.PreTrainedConfig
    theirs: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]
    ours: Callable[[nn.Module, Any, dict[str, np.ndarray]], jax.Array]
    batch: dict[str, np.ndarray]
    part: str | None = None


def language_model(
    model: type[transformers.PreTrainedModel],
    config: type[transformers.PreTrainedConfig],
    length: int = 14,
    **options: Any,
) -> Case:
    """A ragged batch of two texts -> logits of the real tokens."""

    def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"]
        return model(input_ids=batch["ids"], attention_mask=mask.long()).logits[mask]

    def ours(module: nn.Module, variables: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        mask = self_mask(jnp.asarray(batch["mask"]), causal=True)
        hidden, _ = module.apply(variables, jnp.asarray(batch["ids"], jnp.int32), mask)
        return module.apply(variables, hidden, method="logits")[np.nonzero(batch["mask"])]

    return Case(model, config(**TEXT | options), theirs, ours, _texts(length))


def _texts(length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, length))
    return {"ids": ids, "mask": np.arange(length)[None] < np.array([[length], [length - 5]])}


def _llama(**options: Any) -> Case:
    return language_model(transformers.LlamaForCausalLM, transformers.LlamaConfig, **options)


def _qwen3_moe(**options: Any) -> Case:
    return language_model(
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        num_experts=5,
        moe_intermediate_size=24,
        num_experts_per_tok=2,
        head_dim=12,
        **options,
    )


def _scaled(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0} | settings}


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
}
TOWER_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 14, "bos_token_id": 2}
TOWER_TEXT |= {"eos_token_id": 1, "pad_token_id": 0}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def _pictures(height: int, width: int, mean: tuple, std: tuple) -> dict[str, np.ndarray]:
    """In 0..1 for us, normalised and channels first for them."""
    picture = np.random.default_rng(0).random((2, height, width, 3), np.float32)
    normal = (picture - np.float32(mean)) / np.float32(std)
    return {"picture": picture, "pixel_values": np.ascontiguousarray(normal.transpose(0, 3, 1, 2))}


def _present(picture: np.ndarray) -> Tokens:
    return Tokens(jnp.asarray(picture), jnp.ones((len(picture),), bool))


def dinov2(
    model: type[transformers.PreTrainedModel],
    config: type[transformers.PreTrainedConfig],
    size: tuple[int, int] = (16, 16),
    **options: Any,
) -> Case:
    """Two pictures -> all tokens."""
    options = TOWER | {"image_size": 16, "attn_implementation": "eager"} | options
    return Case(
        model,
        config(**options),
        theirs=lambda model, batch: model(pixel_values=batch["pixel_values"]).last_hidden_state,
        ours=lambda module, variables, batch: (
            module.apply(variables, _present(batch["picture"])).values
        ),
        batch=_pictures(*size, IMAGENET_MEAN, IMAGENET_STD),
    )


def contrastive(
    model: type[transformers.PreTrainedModel],
    config: type[transformers.PreTrainedConfig],
    size: tuple[int, int] = (16, 16),
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """Two pictures and two ragged texts -> logits, pooled embeddings and the patches' tokens."""
    clip = model is transformers.CLIPModel
    texts = _texts(11)
    ids, mask = texts["ids"], texts["mask"]
    ids[np.arange(2), mask.sum(1) - 1] = TOWER_TEXT["eos_token_id"]
    padded = np.pad(np.where(mask, ids, 0), ((0, 0), (0, 3)))  # SigLIP reads its padding
    pictures = _pictures(*size, *((CLIP_MEAN, CLIP_STD) if clip else (HALF, HALF)))
    if model is transformers.Siglip2Model:
        patches = rearrange(
            pictures["pixel_values"], "b c (y p) (x q) -> b (y x) (p q c)", p=4, q=4
        )
        pictures |= {
            "pixel_values": np.ascontiguousarray(patches),
            "spatial_shapes": np.array([[size[0] // 4, size[1] // 4]] * 2),
            "pixel_attention_mask": np.ones(patches.shape[:2], np.int64),
        }

    def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        keys = [key for key in batch if key.startswith(("pixel", "spatial"))]
        out = model(input_ids=batch["padded"], **{key: batch[key] for key in keys})
        tokens = out.vision_model_output.last_hidden_state
        parts = [out.logits_per_image, out.text_embeds, out.image_embeds, tokens]
        return torch.cat([part.flatten() for part in parts])

    def ours(module: nn.Module, variables: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        picture = _present(batch["picture"])
        text = Tokens(jnp.asarray(batch["ids"], jnp.int32), jnp.asarray(batch["mask"]))
        logits = module.apply(variables, picture, text)
        run = nn.apply(lambda m: (m.text.embedding(text), m.vision.embedding(picture)), module)
        vectors = [each / jnp.linalg.norm(each, axis=1, keepdims=True) for each in run(variables)]
        tokens = nn.apply(lambda m: m.vision(picture), module)(variables).values
        return jnp.concatenate([part.reshape(-1) for part in (logits, *vectors, tokens)])

    side = {"num_patches": 16} if model is transformers.Siglip2Model else {"image_size": size[0]}
    settings = config(
        vision_config=TOWER | side | (vision or {}),
        text_config=TOWER | TOWER_TEXT | (text or {}),
        attn_implementation="eager",
        **options,
    )
    batch = {"ids": ids, "mask": mask, "padded": padded} | pictures
    return Case(model, settings, theirs, ours, batch, part="contrastive")


def _sounds(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Two recordings, one shorter, and which samples are real."""
    mask = np.arange(samples)[None] < np.array([[samples], [samples * 2 // 3]])
    sound = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
    return np.where(mask, sound, 0), mask


def whisper(**options: Any) -> Case:
    """Two recordings and two ragged texts -> logits of the real tokens."""
    settings = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=14,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation="eager",
        **options,
    )
    sound, real = _sounds(12_000)
    features = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)(
        [row[keep] for row, keep in zip(sound, real, strict=True)],
        sampling_rate=16_000,
        return_tensors="np",
    ).input_features

    def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"]
        out = model(
            input_features=batch["features"],
            decoder_input_ids=batch["ids"],
            decoder_attention_mask=mask.long(),
        )
        return out.logits[mask]

    def ours(module: nn.Module, variables: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        sound = Tokens(jnp.asarray(batch["sound"]), jnp.asarray(batch["real"]))
        text = Tokens(jnp.asarray(batch["ids"], jnp.int32), jnp.asarray(batch["mask"]))
        return module.apply(variables, sound, text)[np.nonzero(batch["mask"])]

    batch = {"sound": sound, "real": real, "features": features} | _texts(14)
    model = transformers.WhisperForConditionalGeneration
    return Case(model, settings, theirs, ours, batch, part="recogniser")


def wav2vec2(ragged: bool, **options: Any) -> Case:
    """Two recordings -> the tokens of their real frames (base models expect equal lengths)."""
    settings = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(12, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
        attn_implementation="eager",
        **options,
    )
    sound, real = _sounds(400)
    if not ragged:
        sound, real = np.random.default_rng(0).normal(size=sound.shape), np.ones_like(real)
    sound = sound.astype(np.float32)
    extract = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    rows = [row[keep] for row, keep in zip(sound, real, strict=True)]
    features = extract(rows, sampling_rate=16_000, padding=True, return_tensors="np")
    frames = ((real.sum(1) - 10) // 5 + 1 - 3) // 2 + 1
    kept = np.arange(frames.max())[None] < frames[:, None]

    def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"] if ragged else None
        hidden = model(batch["input_values"], attention_mask=mask).last_hidden_state
        return hidden[batch["kept"]]

    def ours(module: nn.Module, variables: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        sound = Tokens(jnp.asarray(batch["sound"]), jnp.asarray(batch["real"]))
        return module.apply(variables, sound).values[np.nonzero(batch["kept"])]

    batch = {"sound": sound, "real": real, "kept": kept, **features}
    return Case(transformers.Wav2Vec2Model, settings, theirs, ours, batch)


def t5(**options: Any) -> Case:
    """Two ragged source texts and two target texts -> logits of the real target tokens."""
    settings = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        attn_implementation="eager",
        **options,
    )

    def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"]
        out = model(
            input_ids=batch["ids"].flip(0),
            attention_mask=mask.flip(0).long(),
            decoder_input_ids=batch["ids"],
            decoder_attention_mask=mask.long(),
        )
        return out.logits[mask]

    def ours(module: nn.Module, variables: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        target = Tokens(jnp.asarray(batch["ids"], jnp.int32), jnp.asarray(batch["mask"]))
        source = jax.tree.map(lambda leaf: leaf[::-1], target)
        return module.apply(variables, source, target)[np.nonzero(batch["mask"])]

    model = transformers.T5ForConditionalGeneration
    return Case(model, settings, theirs, ours, _texts(20), part="text_to_text")


def bert(**options: Any) -> Case:
    """A ragged batch of two texts -> the real tokens."""
    small = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}

    def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"]
        return model(batch["ids"], attention_mask=mask.long()).last_hidden_state[mask]

    def ours(module: nn.Module, variables: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        text = Tokens(jnp.asarray(batch["ids"], jnp.int32), jnp.asarray(batch["mask"]))
        return module.apply(variables, text).values[np.nonzero(batch["mask"])]

    config = transformers.BertConfig(**small | options)
    return Case(transformers.BertModel, config, theirs, ours, _texts(14))


def moonshine(**options: Any) -> Case:
    """Two recordings of one length and two ragged texts -> logits of the real tokens."""
    settings = transformers.MoonshineConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
        },
        attn_implementation="eager",
        **options,
    )

    def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out = model(
            input_values=batch["sound"],
            decoder_input_ids=batch["ids"],
            decoder_attention_mask=batch["mask"].long(),
        )
        return out.logits[batch["mask"]]

    def ours(module: nn.Module, variables: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        sound = Tokens(jnp.asarray(batch["sound"]), jnp.ones(batch["sound"].shape, bool))
        text = Tokens(jnp.asarray(batch["ids"], jnp.int32), jnp.asarray(batch["mask"]))
        return module.apply(variables, sound, text)[np.nonzero(batch["mask"])]

    sound = np.random.default_rng(0).normal(size=(2, 3000)).astype(np.float32)
    model = transformers.MoonshineForConditionalGeneration
    return Case(model, settings, theirs, ours, {"sound": sound} | _texts(14), part="recogniser")


CASES: dict[str, Callable[[], Case]] = {
    "gpt2": partial(
        language_model,
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
    ),
    "gpt2 options": partial(
        language_model,
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=40,
        scale_attn_by_inverse_layer_idx=True,
        activation_function="relu",
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    ),
    "llama 3": partial(
        _llama,
        **_scaled(
            "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    ),
    "llama options": partial(
        _llama,
        attention_bias=True,
        mlp_bias=True,
        head_dim=12,
        tie_word_embeddings=True,
        hidden_act="gelu",
        rms_norm_eps=1e-3,
    ),
    "rope linear": partial(_llama, **_scaled("linear")),
    "rope dynamic": partial(_llama, length=24, **_scaled("dynamic")),
    "rope dynamic, short": partial(_llama, length=12, **_scaled("dynamic")),
    "rope yarn": partial(_llama, **_scaled("yarn", original_max_position_embeddings=8)),
    "rope yarn options": partial(
        _llama,
        **_scaled(
            "yarn",
            original_max_position_embeddings=8,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=1.2,
            truncate=False,
        ),
    ),
    "smollm2": partial(_llama, tie_word_embeddings=True),
    "mistral": partial(
        language_model,
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        sliding_window=5,
        head_dim=12,
    ),
    "qwen2.5": partial(
        language_model,
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": partial(
        language_model,
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        head_dim=12,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    ),
    "qwen3 moe": partial(_qwen3_moe, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3 moe options": partial(
        _qwen3_moe,
        decoder_sparse_step=2,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        tie_word_embeddings=True,
    ),
    "gemma 2": partial(
        language_model,
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        head_dim=12,
        sliding_window=5,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0,
        attention_bias=True,
    ),
    "gemma 3": partial(
        language_model,
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        head_dim=12,
        sliding_window=5,
        query_pre_attn_scalar=20,
        final_logit_softcapping=2.0,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        },
    ),
    "bert": bert,
    "clip": partial(
        contrastive,
        transformers.CLIPModel,
        transformers.CLIPConfig,
        projection_dim=20,
        text={"hidden_act": "gelu", "hidden_size": 24},
    ),
    "siglip": partial(
        contrastive,
        transformers.SiglipModel,
        transformers.SiglipConfig,
        size=(18, 18),  # no multiple of the patch, like 384 / 14 of so400m
        text={"hidden_size": 24, "projection_size": 32},
    ),
    "siglip 2": partial(
        contrastive, transformers.Siglip2Model, transformers.Siglip2Config, size=(12, 24)
    ),
    "dinov2": partial(dinov2, transformers.Dinov2Model, transformers.Dinov2Config),
    "dinov2 options": partial(
        dinov2,
        transformers.Dinov2Model,
        transformers.Dinov2Config,
        size=(12, 28),
        use_swiglu_ffn=True,
        qkv_bias=False,
        mlp_ratio=3,
    ),
    "dinov2 registers": partial(
        dinov2,
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        size=(12, 28),
        num_register_tokens=3,
    ),
    "whisper": whisper,
    "moonshine": moonshine,
    "t5": t5,
    "t5 1.1": partial(t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "wav2vec 2.0": partial(wav2vec2, ragged=False, num_conv_pos_embeddings=9),
    "wav2vec 2.0 large": partial(
        wav2vec2,
        ragged=True,
        num_conv_pos_embeddings=8,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
        feat_extract_activation="silu",
        hidden_act="relu",
    ),
    "whisper options": partial(whisper, activation_function="relu"),
}
