"""Learning to write down what is said: connectionist temporal classification (CTC).

Joint CTC and attention (Watanabe et al. 2017) is a sum like any other. Where both read the same
outputs, an encoder's head and a decoder, CTC goes along with the decoder's loss:

    objective = causal_lm(model, label_smoothing=0.1, also=weighted_sum({ctc(head, "spoken"): 0.3}))
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fusion_jax.encoders.mel import spec_augment
from fusion_jax.errors import UserError
from fusion_jax.language.items import as_items
from fusion_jax.language.spoken import SpokenLM
from fusion_jax.language.tuned import Tuned
from fusion_jax.objectives.combine import (
    Batch,
    Loss,
    Metrics,
    Objective,
    Params,
    on_batch,
    weighted_sum,
)
from fusion_jax.objectives.distillation import soft_targets
from fusion_jax.objectives.generative import logits_of_answers
from fusion_jax.objectives.rows import row_mean
from fusion_jax.tokens import Tokens, fill


def ctc_nll(logits: Tokens, labels: Tokens, blank: int = 0) -> tuple[jax.Array, jax.Array]:
    """-log p(labels | frames) summed over all alignments, float32 [b], and which rows have one.

    https://dl.acm.org/doi/10.1145/1143844.1143891. A row has no alignment if its real frames are
    fewer than its labels and the blanks between equal neighbours; it is 0 and sends no gradient,
    as is a row without labels. Padding may hold anything.

    Args:
      logits: [b, frames, classes], real frames first.
      labels: int [b, t], real ones first, without `blank`.
    """
    frames, wanted = logits.mask, labels.mask
    ids = jnp.where(wanted, labels.values, blank)
    repeats = (ids[:, 1:] == ids[:, :-1]) & wanted[:, 1:]
    least = wanted.sum(axis=1) + repeats.sum(axis=1)
    possible = (least <= frames.sum(axis=1)) & wanted.any(axis=1)
    # A row that cannot be aligned is given frames in plenty: optax would return 1e5 for it.
    counted = frames & possible[:, None]
    scores = fill(Tokens(logits.values.astype(jnp.float32), counted))
    nll = optax.ctc_loss(
        scores,
        (~counted).astype(jnp.float32),
        ids,
        (~wanted).astype(jnp.float32),
        blank_id=blank,
        log_epsilon=-1e30,
    )
    return jnp.where(possible, nll, 0.0), possible


def ctc(logits: Callable[[Any], Tokens], labels: str, blank: int = 0) -> Loss:
    """CTC of an encoder's frames, per label: rows' losses over rows' lengths, the mean of rows.

    Reports `ctc_rows`, the share of labelled rows that have an alignment and count.

    Args:
      logits: model's outputs -> Tokens [b, frames, classes].
      labels: the batch's entry, Tokens of int [b, t].
    """

    def ctc(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        wanted = batch[labels]
        nll, possible = ctc_nll(logits(outputs), wanted, blank)
        lengths = wanted.mask.sum(axis=1).clip(1).astype(jnp.float32)
        share = row_mean(possible, wanted.present)
        return row_mean(nll / lengths, possible), {"ctc_rows": share}

    return ctc


def spell_and_answer(
    model: SpokenLM, answers: Mapping[str, Objective], ctc_weight: float
) -> Objective:
    """Spells the stream "listen" of `Dictation`, and learns answers where there are any.

    Args:
        answers: {stream of `Turns`: how it is learned}; each counts alike.
        ctc_weight: of the spelling, once there are answers.

    Raises:
        UserError: a batch with another stream.
    """
    spelling = ctc(lambda logits: logits, "spoken")

    def spell(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        masked, dropped = jax.random.split(rng)
        heard = spec_augment(batch["audio"], masked, bands=30, time=0.1)
        logits = model.listener.apply(
            {"params": params["base"]["connectors_audio"]},
            heard,
            train=True,
            rngs={"dropout": dropped},
            method="spell",
        )
        return spelling(logits, batch)

    def hearing(answer: Objective) -> Objective:
        @wraps(answer)
        def reply(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
            return answer(params, as_items(batch, "audio"), rng)

        return reply

    alone = on_batch("listen", spell)
    replies = {name: on_batch(name, hearing(answer)) for name, answer in answers.items()}

    def objective(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        if unknown := sorted(set(batch) - {"listen", "step", "id", *replies}):
            raise UserError(f"streams {unknown} are not learned: answers has {sorted(replies)}")
        parts = {reply: 1.0 for name, reply in replies.items() if name in batch}
        both = weighted_sum(parts | {alone: ctc_weight}) if parts else alone
        return both(params, batch, rng)

    return objective


def as_typed(model: Tuned, most: int) -> Objective:
    """KL(typed || spoken) of each answer token: speech is answered as its words would have been.

    Those the model without its adapters is asked, on batches of `Typed`: as it came, but for what
    training prunes or rounds. So what is spoken moves towards what the language model knows
    already, and a turn that is typed anyway holds it where it was (after BLSP, arXiv 2309.00916,
    and AudioChatLlama, arXiv 2311.06753). Reports `agreement`: how often both expect the same token
    most.

    Args:
        most: tokens of an answer; what lies beyond is not learned.
    """

    def as_typed(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        typed = {"text": batch["typed"], "weight": batch["typed_weight"]}
        expected, known = logits_of_answers(model.model, params["base"], typed, most)
        found, weights = logits_of_answers(
            model, params, batch, most, train=True, rngs={"dropout": rng}
        )
        weights *= known  # a row that was cut off has less of the answer
        same = found.argmax(axis=-1) == expected.argmax(axis=-1)
        return soft_targets(found, expected, weights), {"agreement": row_mean(same, weights)}

    return as_typed
