"""A tiny Llama with random weights, the same in transformers and here."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch
import transformers

from fusion_jax.language.decoder import Decoder
from fusion_jax.language.prompt import Prompt, text_mask
from fusion_jax.transformer import MLP, Attention, Block, Rope

VOCABULARY, WIDTH, HEADS, KV, LAYERS, CONTEXT = 61, 16, 4, 2, 2, 96


def decoder(window: int | None = None, **settings) -> Decoder:
    norm = partial(nn.RMSNorm, epsilon=1e-6)
    block = partial(
        Block,
        attention=partial(
            Attention,
            heads=HEADS,
            kv_heads=KV,
            bias=False,
            out_bias=False,
            rope=Rope.plain(WIDTH // HEADS),
            window=window,
        ),
        mlp=partial(MLP, hidden_width=32, activation=nn.silu, gated=True, bias=False),
        norm=norm,
    )
    return Decoder(VOCABULARY, WIDTH, (block,) * LAYERS, norm, context_length=CONTEXT, **settings)


def torch_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def params_of(model: transformers.LlamaForCausalLM) -> dict:
    weights = {name: jnp.asarray(leaf.numpy()) for name, leaf in model.state_dict().items()}

    def dense(name):
        return {"kernel": weights[f"{name}.weight"].T}

    def norm(name):
        return {"scale": weights[f"{name}.weight"]}

    layers = {}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        layers[f"layer_{i}"] = {
            "attention_norm": norm(f"{at}.input_layernorm"),
            "attention": {
                "query": dense(f"{at}.self_attn.q_proj"),
                "key": dense(f"{at}.self_attn.k_proj"),
                "value": dense(f"{at}.self_attn.v_proj"),
                "out": dense(f"{at}.self_attn.o_proj"),
            },
            "mlp_norm": norm(f"{at}.post_attention_layernorm"),
            "mlp": {name: dense(f"{at}.mlp.{name}_proj") for name in ("up", "gate", "down")},
        }
    return {
        "embedding": {"embedding": weights["model.embed_tokens.weight"]},
        "transformer": layers | {"final_norm": norm("model.norm")},
    }


def random_params(model: Decoder, seed: int = 0) -> dict:
    """Larger than usual, so that what is far away matters."""
    prompt = Prompt.of([[1, 2, 3]])
    params = model.init(jax.random.key(seed), jnp.asarray(prompt.ids), text_mask(prompt.mask))
    return jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf, params["params"])
