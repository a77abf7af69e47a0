"""Learning without labels by filling in what was hidden: words of a text, patches of a picture.

What is hidden is a pure function of the rng, so that a step can be run again exactly.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Metrics, Objective, Params
from fusion_jax.objectives.rows import row_mean
from fusion_jax.tokens import Tokens, fill

GREY = 0.5  # what a hidden patch shows: the middle of the range 0..1


def corrupt_text(
    rng: jax.Array,
    text: Tokens,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
    special: Sequence[int] = (),
) -> tuple[Tokens, jax.Array]:
    """BERT's corruption (Devlin et al. 2019) of ids [b, t]; returns it and the chosen, bool [b, t].

    Each real token that is not `special` is chosen with probability `rate`; of the chosen, 80%
    become `mask_id`, 10% any id of the vocabulary, 10% stay.
    """
    choose_rng, action_rng, id_rng = jax.random.split(rng, 3)
    ids = text.values
    ordinary = text.mask & ~jnp.isin(ids, jnp.asarray(special, ids.dtype))
    chosen = ordinary & jax.random.bernoulli(choose_rng, rate, ids.shape)
    action = jax.random.uniform(action_rng, ids.shape)
    anything = jax.random.randint(id_rng, ids.shape, 0, vocab_size, ids.dtype)
    shown = jnp.where(action < 0.8, jnp.asarray(mask_id, ids.dtype), anything)
    shown = jnp.where(chosen & (action < 0.9), shown, ids)
    return text.replace(values=shown), chosen


def masked_language_modelling(
    predict: Callable[[Params, Batch, jax.Array], jax.Array],
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
    special: Sequence[int] = (),
    text: str = "text",
    axis_name: str | None = None,
) -> Objective:
    """Cross-entropy of the chosen tokens given the corrupted text and all other modalities.

    `predict(params, batch, rng)` returns logits [b, t, vocab] for a batch whose `text` is
    corrupted. Reports `masked_text_accuracy`. Raises UserError for a rate outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise UserError(f"rate is the share of tokens to hide, in (0, 1], and {rate} was given")

    def masked_language_modelling(
        params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        corrupt_rng, predict_rng = jax.random.split(rng)
        shown, chosen = corrupt_text(
            corrupt_rng, batch[text], mask_id, vocab_size, rate, tuple(special)
        )
        logits = predict(params, {**batch, text: shown}, predict_rng).astype(jnp.float32)
        logits = jnp.where(chosen[..., None], logits, jnp.float32(0))
        truth = jnp.where(chosen, batch[text].values, 0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), truth[..., None], axis=-1)[..., 0]
        correct = logits.argmax(axis=-1).astype(truth.dtype) == truth
        accuracy = row_mean(correct, chosen, axis_name)
        return row_mean(-picked, chosen, axis_name), {"masked_text_accuracy": accuracy}

    return masked_language_modelling


def patchify(pictures: jax.Array, patch: int) -> jax.Array:
    """[b, h, w, c] into rows of pixels [b, (h / patch) (w / patch), patch * patch * c]."""
    if pictures.shape[1] % patch or pictures.shape[2] % patch:
        raise UserError(
            f"pictures of {pictures.shape[1]}x{pictures.shape[2]} pixels do not divide into "
            f"patches of {patch}x{patch}; choose a patch size that divides both sides"
        )
    return rearrange(pictures, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def hidden_patches(rng: jax.Array, rows: int, patches: int, ratio: float) -> jax.Array:
    """Exactly round(ratio * patches) of each row, chosen evenly: bool [rows, patches]."""
    rank = jax.random.uniform(rng, (rows, patches)).argsort(axis=1).argsort(axis=1)
    return rank < round(ratio * patches)


def masked_patch_modelling(
    predict: Callable[[Params, Batch, jax.Array], jax.Array],
    patch: int = 16,
    ratio: float = 0.6,
    normalize: bool = True,
    image: str = "image",
    axis_name: str | None = None,
) -> Objective:
    """Mean squared error of the hidden patches' pixels (MAE, He et al. 2022; SimMIM, Xie et al.).

    `predict(params, batch, rng)` returns pixels [b, n, patch * patch * 3]. Its batch shows grey
    where patches are hidden, and says where in batch["hidden"], bool [b, n], for encoders that put
    a learned token there or leave them out. `normalize` asks for each patch's pixels less their
    mean, over their deviation.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio is the share of patches to hide, in (0, 1], and {ratio} was given")

    def masked_patch_modelling(
        params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        hide_rng, predict_rng = jax.random.split(rng)
        pictures = fill(batch[image]).astype(jnp.float32)
        target = patchify(pictures, patch)
        hidden = hidden_patches(hide_rng, target.shape[0], target.shape[1], ratio)
        covered = repeat(
            hidden,
            "b (h w) -> b (h p) (w q) 1",
            h=pictures.shape[1] // patch,
            p=patch,
            q=patch,
        )
        shown = jnp.where(covered, jnp.asarray(GREY, jnp.float32), pictures)
        shown = batch[image].replace(values=shown.astype(batch[image].values.dtype))
        predicted = predict(params, {**batch, image: shown, "hidden": hidden}, predict_rng)

        if normalize:
            deviation = jnp.sqrt(target.var(axis=-1, keepdims=True) + 1e-6)
            target = (target - target.mean(axis=-1, keepdims=True)) / deviation
        counts = hidden & batch[image].present[:, None]
        error = jnp.where(counts[..., None], predicted.astype(jnp.float32) - target, 0.0)
        return row_mean((error**2).mean(axis=-1), counts, axis_name), {}

    return masked_patch_modelling
