"""A language model, adapters merged, for other programs: a transformers folder, or a GGUF file."""

from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant
from fusion_jax.language.fused import FusedLM
from fusion_jax.pretrained.gguf_save import Numbers, save_gguf
from fusion_jax.pretrained.save import save


def write(
    target: Path, model: Any, format: Literal["transformers", "gguf"], numbers: Numbers
) -> None:
    """Writes the decoder of an `Assistant`. What it was fused with has no place in these formats.

    Raises:
        UserError: no language model, or not one of a known family.
    """
    if not isinstance(model, Assistant) or model.config is None:
        raise UserError(f"{format} holds language models: this is none, or one without a config")
    decoder = model.params["decoder"] if isinstance(model.model, FusedLM) else model.params
    tokenizer, template = model.chat.tokenizer, model.chat.template
    if format == "gguf":
        save_gguf(target, decoder, model.config, tokenizer, template, numbers=numbers)
        return
    if numbers == "q8_0":
        raise UserError("transformers folders are float32 or float16 here: give --numbers float16")
    dtype = jnp.dtype(numbers)
    save(target, decoder, model.config, None, tokenizer, template, dtype=dtype)
