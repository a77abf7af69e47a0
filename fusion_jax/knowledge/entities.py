"""Scorers whose entity vectors are computed: from text, so that new entities can be scored, or by
a graph encoder.

    features = text_features(described(graph))               # MiniLM on names and descriptions
    scorer = from_text(ComplEx(...), features, seen)
    scorer = from_graph(DistMult(...), CompGCN(...), graph)

Both are used like any scorer: in objectives, in ranking, in `train`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.encoders.graph import CompGCN, Edges
from fusion_jax.encoders.pooling import mean
from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph
from fusion_jax.knowledge.scorers import Params, Scorer
from fusion_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """A scorer whose params are computed from others first.

    Attributes:
        scorer: what scores.
        init: key -> params.
        params_of: (params, rng) -> the scorer's params; rng None: no dropout.
    """

    scorer: Scorer
    init: Callable[[jax.Array], Params]
    params_of: Callable[[Params, jax.Array | None], Params]

    @property
    def entities(self) -> int:
        return self.scorer.entities

    def score(
        self,
        params: Params,
        h: jax.Array,
        r: jax.Array,
        t: jax.Array,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """As the scorer's."""
        return self.scorer.score(self.params_of(params, rng), h, r, t, rng)

    def score_all(
        self,
        params: Params,
        h: jax.Array,
        r: jax.Array,
        rng: jax.Array | None = None,
        tails: jax.Array | None = None,
    ) -> jax.Array:
        """As the scorer's."""
        return self.scorer.score_all(self.params_of(params, rng), h, r, rng, tails)

    def moduli(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """As the scorer's."""
        return self.scorer.moduli(self.params_of(params, None))


def from_text(scorer: Scorer, features: np.ndarray, seen: np.ndarray) -> Computed:
    """An entity's vector is a linear map of its text's, plus one of its own if it was `seen`.

    The own part starts at zero: training adds what the text does not say. Entities of no training
    fact are scored by their text alone. In the spirit of DKRL (Xie et al. 2016, AAAI).

    Args:
        scorer: any.
        features: float [entities, k], of about unit variance or length; see `text_features`.
        seen: bool [entities], which have training facts.
    """
    if features.shape[0] != scorer.entities or seen.shape != (scorer.entities,):
        raise UserError(
            f"features {features.shape} and seen {seen.shape} for {scorer.entities} entities"
        )
    rows = -(-scorer.entities // scorer.multiple) * scorer.multiple
    padding = (0, rows - scorer.entities)
    text = np.pad(np.asarray(features, np.float32), (padding, (0, 0)))
    own = np.pad(seen, padding)[:, None].astype(np.float32)
    size = float(np.linalg.norm(features, axis=1).mean())

    def init(key: jax.Array) -> Params:
        params = scorer.init(key)
        # So scaled that vectors start as large as the scorer's own would.
        shape = (features.shape[1], scorer.dim)
        first = jax.random.normal(jax.random.fold_in(key, 2), shape) * (scorer.scale / size)
        return params | {"text": first, "entity": jnp.zeros_like(params["entity"])}

    def params_of(params: Params, rng: jax.Array | None) -> Params:
        return params | {"entity": jnp.asarray(text) @ params["text"] + own * params["entity"]}

    return Computed(scorer, init, params_of)


def from_graph(scorer: Scorer, encoder: Any, graph: Graph) -> Computed:
    """Entity vectors, and with CompGCN relations' too, are what an encoder makes of the graph.

    Args:
        scorer: any; its dim must be the encoder's width. With CompGCN one whose relations have
            vectors as wide as entities': not RotatE or TuckER.
        encoder: RGCN or CompGCN; it reads the training facts.
        graph: the graph.
    """
    if encoder.width != scorer.dim or scorer.multiple != 1:
        raise UserError(f"an encoder of width {encoder.width} for a scorer of dim {scorer.dim}")
    relations = 2 * len(graph.relations)
    for part in (encoder, scorer):
        if part.relations != relations:
            raise UserError(
                f"{type(part).__name__} for {part.relations} relations, but the graph has"
                f" {relations} with their reciprocals"
            )
    wanted = jax.eval_shape(scorer.init, jax.random.key(0))["relation"].shape[1]
    if isinstance(encoder, CompGCN) and encoder.width != wanted:
        raise UserError(
            f"CompGCN makes relations' vectors of width {encoder.width}, and"
            f" {type(scorer).__name__} takes {wanted}: give an RGCN, or another scorer"
        )
    edges = Edges.of_graph(graph)
    mask = jnp.ones((1, scorer.entities), bool)
    whole = encoder.encode if isinstance(encoder, CompGCN) else encoder.__call__
    name = whole.__name__

    def init(key: jax.Array) -> Params:
        params = scorer.init(key)
        nodes = Tokens(params["entity"][None], mask)
        return params | {"encoder": encoder.init(key, nodes, edges, method=name)["params"]}

    def params_of(params: Params, rng: jax.Array | None) -> Params:
        nodes = Tokens(params["entity"][None], mask)
        made = encoder.apply(
            {"params": params["encoder"]},
            nodes,
            edges,
            train=rng is not None,
            rngs={} if rng is None else {"dropout": rng},
            method=name,
        )
        if isinstance(encoder, CompGCN):
            tokens, relation = made
            return params | {"entity": tokens.values[0], "relation": relation}
        return params | {"entity": made.values[0]}

    return Computed(scorer, init, params_of)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts as a source of examples."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"id": row, "text": self.texts[row]}

    @cached_property
    def checksum(self) -> str:
        """Changes with any text."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode() + b"\n")
        return digest.hexdigest()


def described(graph: Graph, language: str = "en") -> list[str]:
    """What is said of each entity: its name, then its description."""
    labels = [graph.label(row, language) for row in range(len(graph.entities))]
    if not len(graph.descriptions):
        return labels
    pairs = zip(labels, graph.descriptions, strict=True)
    return [f"{label}: {said}" if said else label for label, said in pairs]


def text_features(
    texts: Sequence[str],
    tower: str = "all-minilm-l6-v2",
    *,
    length: int = 24,
    batch_size: int = 64,
) -> np.ndarray:
    """Mean-pooled embeddings of texts, of unit length, float32 [n, k].

    Computed once and kept in the cache. `length`: tokens of a text that are read.
    """
    from fusion_jax.data import features  # heavy: the data pipeline and checkpoints
    from fusion_jax.pretrained.tower import open_tower

    frozen = features.freeze(
        Texts(texts),
        {"text": open_tower(tower, "text", length=length).frozen(mean)},
        batch_size=batch_size,
    )
    index, tokens = frozen.fields["text"]
    rows = np.stack([tokens[entry][0] for entry in index]).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
