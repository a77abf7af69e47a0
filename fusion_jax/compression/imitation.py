"""Training a smaller model to say what a trained one says, on the trained one's own data.

    params = distil(student, teacher, workdir)

Beside the run's own objective the student minimises, on the same batches,

    soft targets      the teacher's answer words or classes, softened (arXiv 1503.02531)
    hidden states     the teacher's, after a learned linear map to its width (arXiv 1412.6550)

What both are is seen by looking on while the experiment's own objective runs a model, so every
experiment can be distilled: a fused language model by its answers and last hidden states, a fusion
of modalities by its classes and its vectors of each modality, any other by what it returns
(arXiv 1312.6184). The teacher's params are plain arguments, frozen, and run without dropout.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fusion_jax.compression.calibration import without_dropout
from fusion_jax.compression.students import Run
from fusion_jax.errors import UserError
from fusion_jax.objectives.distillation import hidden_states, soft_targets
from fusion_jax.objectives.generative import sources
from fusion_jax.training import loop
from fusion_jax.training.step import Objective

TEMPERATURE = 2.0
CHUNK = 16
"""Positions of each row whose words are compared at a time."""
TEACHER, MAPS = "teacher", "to_teacher"
"""Where the teacher's params and the maps to its width stand beside the student's."""

Params = dict[str, Any]
Context = nn.module.InterceptorContext


@dataclasses.dataclass(frozen=True)
class Seen:
    """A model that an objective ran, what it was given and what it returned."""

    module: nn.Module
    variables: Any
    batch: Any
    outputs: Any

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [b, t, d] -> words [b, t, v]."""
        return self.module.apply(self.variables, hidden, method="logits")

    @property
    def states(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """{name: (vectors [b, t, d], bool [b, t])} that a student's are to be mapped to."""
        found = {}
        if hasattr(self.outputs, "hidden"):
            found["hidden"] = (self.outputs.hidden, self.outputs.mask)
        for name, vectors in getattr(self.outputs, "embeddings", {}).items():
            found[name] = (vectors[:, None], self.outputs.present[name][:, None])
        return found


def watched(objective: Objective) -> Callable[..., tuple[tuple[jax.Array, dict], list[Seen]]]:
    """The objective, and the models that it ran, in their order."""

    def run(params: Params, batch: Any, rng: jax.Array) -> tuple[tuple, list[Seen]]:
        seen: list[Seen] = []

        def note(
            call: Callable[..., Any],
            args: tuple,
            kwargs: dict,
            context: nn.module.InterceptorContext,
        ) -> Any:
            outputs = call(*args, **kwargs)
            if context.method_name == "__call__" and not context.module.scope.path:
                seen.append(Seen(*context.module.unbind(), args[0], outputs))
            return outputs

        with nn.intercept_methods(note):
            result = objective(params, batch, rng)
        return result, seen

    return run


def imitate(student: Objective, teacher: Objective) -> Objective:
    """The student's objective, and the distance to what the teacher says and thinks.

    Its params are the student's, {TEACHER: the teacher's, MAPS: {place: {state: [d, e]}}}.
    Reports "own" (the student's loss alone), "soft_targets" and "hidden_states".
    """
    student, teacher = watched(student), watched(without_dropout(teacher))

    def imitate(params: Params, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict]:
        (own, metrics), made = student(_student(params), batch, rng)
        _, shown = teacher(jax.lax.stop_gradient(params[TEACHER]), batch, rng)
        said = sum(map(_said, made, shown)) / len(made)
        thought, maps = jnp.zeros((), jnp.float32), params.get(MAPS, {})
        for place, (mine, theirs) in enumerate(zip(made, shown, strict=True)):
            for name, (vectors, mask) in mine.states.items():
                wanted = theirs.states[name][0].astype(jnp.float32)
                size = jnp.square(jax.lax.stop_gradient(wanted)).mean() + 1e-6
                gap = hidden_states(vectors, wanted, maps[str(place)][name], mask)
                thought += gap / size / len(mine.states) / len(made)
        metrics = metrics | {"own": own, "soft_targets": said, "hidden_states": thought}
        return own + said + thought, metrics

    return imitate


def _said(made: Seen, shown: Seen) -> jax.Array:
    """How far apart two models are in what they say."""
    if hasattr(made.outputs, "logits"):
        return soft_targets(made.outputs.logits, shown.outputs.logits, temperature=TEMPERATURE)
    if hasattr(made.outputs, "hidden"):
        return _words(made, shown)
    if isinstance(made.outputs, jax.Array):
        gap = made.outputs - jax.lax.stop_gradient(shown.outputs)
        return jnp.square(gap.astype(jnp.float32)).mean()
    raise UserError(
        f"{type(made.module).__name__} returns no array, no logits and no hidden states: there is "
        "nothing that a student could imitate"
    )


def _words(made: Seen, shown: Seen) -> jax.Array:
    """Soft targets over the words of the answers, a chunk of positions at a time."""
    before, weights = sources(shown.outputs.mask, shown.batch)
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    before = jnp.take_along_axis(before, order, axis=1)
    weights = jnp.take_along_axis(weights, order, axis=1)
    chunk = min(CHUNK, weights.shape[1])

    def parts(leaf: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, -leaf.shape[1] % chunk)) + ((0, 0),) * (leaf.ndim - 2)
        return rearrange(jnp.pad(leaf, padding), "b (n c) ... -> n b c ...", c=chunk)

    def front(hidden: jax.Array) -> jax.Array:
        return parts(jnp.take_along_axis(hidden, before[..., None], axis=1))

    @jax.checkpoint
    def gap(mine: jax.Array, theirs: jax.Array, counts: jax.Array) -> jax.Array:
        pair = made.logits(mine), shown.logits(theirs)
        return soft_targets(*pair, counts, temperature=TEMPERATURE) * counts.sum()

    def add(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        skip = partial(jnp.zeros, (), jnp.float32)
        return total + jax.lax.cond(part[2].sum() > 0, gap, lambda *_: skip(), *part), None

    stacks = front(made.outputs.hidden), front(shown.outputs.hidden), parts(weights)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), stacks)
    return total / jnp.maximum(weights.sum(), 1e-6)


def distil(student: Run, teacher: Run, workdir: Path) -> Params:
    """Trains the student for as many steps as its settings say; its params.

    One whose language model was cut is trained whole, since it has to heal; another where its
    experiment trains it. Killed and called again it goes on from its last checkpoint in `workdir`.
    """
    maps = partial(_maps, student, teacher)
    start = student.experiment.pretrained if student.params is None else student.params
    given = {**start, TEACHER: teacher.params}

    def init(key: jax.Array) -> Params:
        fresh, mapping = jax.random.split(key)
        blank = jax.tree.map(jnp.zeros_like, teacher.params)
        return {**student.experiment.init(fresh), TEACHER: blank} | maps(mapping)

    trainable = "" if student.cut else student.experiment.trainable
    validate = student.experiment.validate
    experiment = dataclasses.replace(
        student.experiment,
        init=init,
        objective=imitate(student.experiment.objective, teacher.experiment.objective),
        pretrained=given,
        trainable=rf"^{MAPS}/|^(?!{TEACHER}/).*?(?:{trainable})",
        validate=None if validate is None else lambda params: validate(_student(params)),
        report=None,
    )
    loop.train(experiment, student.settings, workdir)
    return _student(loop.restore_params(experiment, student.settings, workdir))


def _student(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if name not in (TEACHER, MAPS)}


def _maps(student: Run, teacher: Run, key: jax.Array) -> Params:
    """{MAPS: {place: {state: [d, e]}}}: the identity where widths agree, else drawn at random."""
    batch = {**student.experiment.data[0], "step": np.int32(0)}

    def states(run: Run, params: Params, batch: Any) -> list[dict[str, jax.Array]]:
        _, seen = watched(run.experiment.objective)(params, batch, jax.random.key(0))
        return [{name: pair[0] for name, pair in each.states.items()} for each in seen]

    fresh = jax.eval_shape(student.experiment.init, key)
    mine = jax.eval_shape(partial(states, student), fresh, batch)
    theirs = jax.eval_shape(partial(states, teacher), teacher.params, batch)
    drawn: dict[str, dict[str, jax.Array]] = {}
    for place, (small, large) in enumerate(zip(mine, theirs, strict=True)):
        for number, name in enumerate(sorted(small)):
            sizes = small[name].shape[-1], large[name].shape[-1]
            own_key = jax.random.fold_in(jax.random.fold_in(key, place), number)
            mapping = jax.random.normal(own_key, sizes) * sizes[0] ** -0.5
            if sizes[0] == sizes[1]:
                mapping = jnp.eye(sizes[0], dtype=jnp.float32)
            drawn.setdefault(str(place), {})[name] = mapping
    return {MAPS: drawn} if drawn else {}
