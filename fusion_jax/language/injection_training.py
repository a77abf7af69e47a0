"""How a model that reads facts is trained, and what is kept as it was.

    loss = objective(model, writer, keep_weight=1.0, rule_weight=0.3, chunk=1)
    chains = Fours.of(writer, fours, batch_size, seed)     # on what "chains" is
    before, after = plain_english(model, writer, untrained(params), params)

`model` is what `injection.fuse` gives, within `LoRA` or `Tuned`.
"""

import dataclasses
import re
from collections.abc import Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.data import prose
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pipeline import Batches
from fusion_jax.errors import UserError
from fusion_jax.knowledge.questions import Task
from fusion_jax.language.injection import FactWriter, log_odds
from fusion_jax.objectives.combine import (
    Batch,
    Metrics,
    Objective,
    Params,
    on_batch,
    weighted_sum,
)
from fusion_jax.objectives.generative import causal_lm, stay_close
from fusion_jax.objectives.rules import TRANSITIVE, rule_loss


def reading(writer: FactWriter, objective: Objective) -> Objective:
    """The objective on batches as the writer collates them."""

    @wraps(objective)
    def read(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        return objective(params, writer.read(batch), rng)

    return read


@dataclasses.dataclass(frozen=True, eq=False)
class Fours:
    """Batches of four questions without facts on each chain, as `TRANSITIVE` has them.

    A chain's four stand one after the other in its micro-batch, which `make_step` makes of each
    accumulation-th row.

    Attributes:
        count: of chains in a batch.
    """

    writer: FactWriter
    fours: Sequence[Sequence[Task]]
    count: int
    seed: int
    accumulation: int = 1

    @classmethod
    def of(
        cls,
        writer: FactWriter,
        fours: Sequence[Sequence[Task]],
        batch_size: int,
        seed: int,
        accumulation: int = 1,
    ) -> "Fours":
        """Half as many questions as a batch has, of the chains that have room in its rows.

        Raises:
            UserError: a batch too small for a chain; no chain that has room.
        """
        count = batch_size // 8
        if not count or count % jax.process_count() or count % accumulation:
            raise UserError(
                "the rule loss needs a batch size of 8, or of a multiple, a process and a micro-"
                "batch of --accumulation"
            )
        fitting = [four for four in fours if all(map(writer.fits, four))]
        if not fitting:
            raise UserError(
                "the rule loss needs questions with chains of two facts that fit into "
                f"{writer.row} tokens: give --length or --hops"
            )
        return cls(writer, fitting, count, seed, accumulation)

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.fours), self.count)
        tasks = [task for row in chosen.tolist() for task in self.fours[row]]
        order = np.arange(len(tasks)).reshape(self.accumulation, -1).T.ravel().tolist()
        examples = [self.writer(tasks[row], (), **self.writer.draw(rng)) for row in order]
        return self.writer.collate(examples, length=self.writer.row)


def transitive(model: Any, writer: FactWriter) -> Objective:
    """Asks the model's own answers on a batch of `Fours` for transitivity."""
    broken = rule_loss(TRANSITIVE, log_odds=lambda odds, batch: odds)

    def transitive(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        odds = log_odds(model, writer, params, batch)
        if len(odds) % 4:  # pmap's devices see their own rows alone
            raise UserError("the rule loss needs a batch size of 8, or of a multiple, a device")
        return broken(odds.reshape(-1, 4), batch)

    return transitive


def objective(
    model: Any, writer: FactWriter, *, keep_weight: float, rule_weight: float, chunk: int
) -> Objective:
    """Answers; what keeps the model as it was; what asks its answers for transitivity.

    On batches {"asked", "plain" (of `plain_batches`), "chains" (of `Fours`)}, those of weight 0
    left out.
    """
    parts = {on_batch("asked", reading(writer, causal_lm(model, chunk=chunk))): 1.0}
    if keep_weight:
        parts[on_batch("plain", reading(writer, stay_close(model, untrained)))] = keep_weight
    if rule_weight:
        parts[on_batch("chains", transitive(model, writer))] = rule_weight
    return weighted_sum(parts)


def plain_batches(writer: FactWriter, batch_size: int, seed: int) -> Batches:
    """Endless rows of plain English, a quarter as many as questions."""
    rows = prose.rows(prose.docstrings(), writer.chat.encode, 24, 2000)
    plain = [{"id": row, **writer.plain(ids)} for row, ids in enumerate(rows)]
    few = max(batch_size // 4, 1)
    return Batches(plain, few, writer.transforms(25), seed=seed, **own_share())


def plain_english(model: Any, writer: FactWriter, *params: Params) -> list[float]:
    """Nats a token on Python's reference, on which nothing here trains, without facts."""
    measure = jax.jit(causal_lm(model, train=False))
    rows = prose.rows(prose.reference(), writer.chat.encode, 96, 16)
    batch = writer.read(writer.collate([writer.plain(row) for row in rows]))
    return [float(measure(each, batch, jax.random.key(0))[0]) for each in params]


def untrained(params: Params) -> Params:
    """With all that was added off: LoRA's matrices, Flamingo's gates and ERNIE's projection 0."""
    flat = flatten_dict(params, sep="/")
    off = {k: jnp.zeros_like(v) for k, v in flat.items() if re.search("^lora/|_gate$|/entity/", k)}
    return unflatten_dict(flat | off, sep="/")
