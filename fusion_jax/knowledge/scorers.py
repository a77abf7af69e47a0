"""How plausible is a fact? Link-prediction scorers, as pure functions of params and indices.

    scorer = ComplEx(entities=135, relations=2 * 46, dim=200)
    params = scorer.init(jax.random.key(0))          # {"entity": [e, d], "relation": [r, d], ...}
    scorer.score(params, h, r, t)                    # [b]; higher is more plausible
    scorer.score_all(params, h, r)                   # [b, entities]: every entity as the tail

h, r, t are int32 and broadcast where sizes are 1: t [b, n] with h, r [b, 1] scores n tails a row.
Heads are asked for as tails of the reciprocal relation r + R (Lacroix et al. 2018,
https://arxiv.org/abs/1806.07297), so `relations` is 2 R.

Each scorer makes a vector of (h, r), the query, and compares it to a vector of t by inner product
or distance. `rng` turns dropout on. ConvE and TuckER have layer normalisation where their papers
have batch normalisation, so that a score depends on nothing but its own triple.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from fusion_jax.errors import UserError

Params = dict[str, Any]

# A sharding rule: the table of entities is split by rows over `tensor`, so that each device makes
# the scores of its own rows, and by width over `fsdp`.
ENTITY_RULE = (r"(^|/)entity$", P("tensor", "fsdp"))


def dot(query: jax.Array, tails: jax.Array) -> jax.Array:
    """Inner products, [..., d] with [..., d] -> [...]."""
    return (query * tails).sum(axis=-1)


def distance(query: jax.Array, tails: jax.Array, norm: int = 2) -> jax.Array:
    """L1 or L2 distances, [..., d] from [..., d] -> [...]."""
    gap = query - tails
    if norm == 1:
        return jnp.abs(gap).sum(axis=-1)
    return jnp.sqrt(jnp.maximum((gap**2).sum(axis=-1), 1e-9))  # no infinite gradient at zero


def all_distances(query: jax.Array, table: jax.Array, norm: int = 2) -> jax.Array:
    """L1 or L2 distances of each query [b, d] from each row of a table [e, d]: [b, e]."""
    if norm == 1:
        return _all_l1(query, table)
    squares = (query**2).sum(axis=-1)[:, None] + (table**2).sum(axis=-1)[None]
    return jnp.sqrt(jnp.maximum(squares - 2.0 * query @ table.T, 1e-9))


@jax.custom_vjp
def _all_l1(query: jax.Array, table: jax.Array) -> jax.Array:
    """A dim at a time: nothing of [b, e, d] is held, and each step is long rows of simple sums."""

    def add(total: jax.Array, dim: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q, t = dim
        return total + jnp.abs(q[:, None] - t[None]), None

    zero = jnp.zeros((len(query), len(table)), query.dtype)
    return jax.lax.scan(add, zero, (query.T, table.T), unroll=8)[0]


def _all_l1_forward(query: jax.Array, table: jax.Array) -> tuple[jax.Array, Any]:
    return _all_l1(query, table), (query, table)


def _all_l1_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[Any, Any]:
    query, table = saved
    ones = jnp.ones(len(table), g.dtype)

    def dim(_: None, pair: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        q, t = pair
        signs = jnp.sign(q[:, None] - t[None]) * g
        return None, (jnp.matmul(signs, ones, precision="highest"), -signs.sum(axis=0))

    _, (query, table) = jax.lax.scan(dim, None, (query.T, table.T))
    return query.T, table.T


_all_l1.defvjp(_all_l1_forward, _all_l1_backward)


def drop(x: jax.Array, rate: float, rng: jax.Array | None, number: int = 0) -> jax.Array:
    """Dropout, if there is an rng; `number` tells the dropouts of one scorer apart."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(rng, number), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What all scorers have.

    Attributes:
        entities, relations: how many; relations with their reciprocals.
        dim: width of an entity's vector (for complex numbers: twice how many).
        dropout: on entity and query vectors.
        scale: standard deviation of initial vectors.
        multiple: the table has so many rows, or a multiple of it, that a mesh can split it evenly.
        halves: whether a vector is two halves, such as real and imaginary parts. Raises UserError
            where dim is odd then.
    """

    halves: ClassVar[bool] = False
    entities: int
    relations: int
    dim: int = 200
    dropout: float = 0.0
    scale: float = 0.1
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.halves and self.dim % 2:
            raise UserError(f"{type(self).__name__}: dim {self.dim} is odd, give an even one")

    def init(self, key: jax.Array) -> Params:
        """Params from a key."""
        rows = -(-self.entities // self.multiple) * self.multiple
        entity, relation = jax.random.split(key)
        return {
            "entity": self.scale * jax.random.normal(entity, (rows, self.dim)),
            "relation": self.scale * jax.random.normal(relation, (self.relations, self.dim)),
        }

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        """What the tail should be like, [..., d]."""
        raise NotImplementedError

    def table(self, params: Params) -> jax.Array:
        """The vector of each entity as a tail, [rows, d]."""
        return params["entity"]

    def compare(self, query: jax.Array, tails: jax.Array) -> jax.Array:
        """Scores, [..., d] with [..., d] -> [...]."""
        return dot(query, tails)

    def compare_all(self, query: jax.Array, table: jax.Array) -> jax.Array:
        """Scores, [b, d] with [e, d] -> [b, e]."""
        return query @ table.T

    def score(
        self,
        params: Params,
        h: jax.Array,
        r: jax.Array,
        t: jax.Array,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of triples, of the shape that h, r and t broadcast to."""
        query = drop(self.query(params, h, r, rng), self.dropout, rng, 1)
        return self.compare(query, self.table(params)[t])

    def score_all(
        self,
        params: Params,
        h: jax.Array,
        r: jax.Array,
        rng: jax.Array | None = None,
        tails: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of every entity as the tail, [b] -> [b, entities]; or of `tails` [n]: [b, n]."""
        query = drop(self.query(params, h, r, rng), self.dropout, rng, 1)
        if tails is not None:
            return self.compare_all(query, self.table(params)[tails])
        return self.compare_all(query, self.table(params))[:, : self.entities]

    def moduli(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """Absolute values that penalties are of: [rows, k] of entities, [relations, k']."""
        return jnp.abs(params["entity"]), jnp.abs(params["relation"])

    def _head(self, params: Params, h: jax.Array, rng: jax.Array | None) -> jax.Array:
        return drop(params["entity"][h], self.dropout, rng)


@dataclasses.dataclass(frozen=True)
class TransE(Scorer):
    """-|h + r - t|. Bordes et al. 2013, https://papers.nips.cc/paper/5071."""

    norm: int = 1

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        return self._head(params, h, rng) + params["relation"][r]

    def compare(self, query: jax.Array, tails: jax.Array) -> jax.Array:
        return -distance(query, tails, self.norm)

    def compare_all(self, query: jax.Array, table: jax.Array) -> jax.Array:
        return -all_distances(query, table, self.norm)


@dataclasses.dataclass(frozen=True)
class RotatE(Scorer):
    """-|h * r - t| with r on the unit circle; the relation's params are its angles.

    Sun et al. 2019, https://arxiv.org/abs/1902.10197. The first half of an entity's vector are
    real parts, the second imaginary parts.
    """

    halves: ClassVar[bool] = True

    def init(self, key: jax.Array) -> Params:
        params = super().init(key)
        shape = (self.relations, self.dim // 2)
        angles = jax.random.uniform(jax.random.fold_in(key, 1), shape, minval=-1.0) * math.pi
        return params | {"relation": angles}

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        angle = params["relation"][r]
        return _multiply(self._head(params, h, rng), jnp.cos(angle), jnp.sin(angle))

    def compare(self, query: jax.Array, tails: jax.Array) -> jax.Array:
        return -distance(query, tails)

    def compare_all(self, query: jax.Array, table: jax.Array) -> jax.Array:
        return -all_distances(query, table)

    def moduli(self, params: Params) -> tuple[jax.Array, jax.Array]:
        return _modulus(params["entity"]), jnp.ones_like(params["relation"])


@dataclasses.dataclass(frozen=True)
class DistMult(Scorer):
    """<h, r, t>. Yang et al. 2015, https://arxiv.org/abs/1412.6575."""

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        return self._head(params, h, rng) * params["relation"][r]


@dataclasses.dataclass(frozen=True)
class ComplEx(Scorer):
    """Re <h, r, conj t>. Trouillon et al. 2016, https://arxiv.org/abs/1606.06357.

    The first half of each vector are real parts, the second imaginary parts.
    """

    halves: ClassVar[bool] = True

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        real, imaginary = jnp.split(params["relation"][r], 2, axis=-1)
        return _multiply(self._head(params, h, rng), real, imaginary)

    def moduli(self, params: Params) -> tuple[jax.Array, jax.Array]:
        return _modulus(params["entity"]), _modulus(params["relation"])


@dataclasses.dataclass(frozen=True)
class SimplE(Scorer):
    """Half of <h, r, t> + <t, r', h>, with entities' vectors as head and as tail apart.

    Kazemi & Poole 2018, https://arxiv.org/abs/1802.04868. Of each vector the first half is as
    head (of r), the second as tail (of r').
    """

    halves: ClassVar[bool] = True

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        as_head, as_tail = jnp.split(self._head(params, h, rng), 2, axis=-1)
        forward, inverse = jnp.split(params["relation"][r], 2, axis=-1)
        return 0.5 * jnp.concatenate([as_tail * inverse, as_head * forward], axis=-1)


@dataclasses.dataclass(frozen=True)
class TuckER(Scorer):
    """A core tensor times h, r and t. Balazevic et al. 2019, https://arxiv.org/abs/1901.09590."""

    relation_dim: int = 30
    norm: bool = True

    def init(self, key: jax.Array) -> Params:
        params = super().init(key)
        first, second = jax.random.split(jax.random.fold_in(key, 1))
        shape = (self.dim, self.relation_dim, self.dim)
        params["core"] = jax.random.uniform(first, shape, minval=-1.0)
        params["relation"] = self.scale * jax.random.normal(
            second, (self.relations, self.relation_dim)
        )
        if self.norm:
            params |= {"head_norm": _norm(self.dim), "query_norm": _norm(self.dim)}
        return params

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        head = params["entity"][h]
        if self.norm:
            head = _normalize(params["head_norm"], head)
        head, relation = drop(head, self.dropout, rng), params["relation"][r]
        # The outer product of h and r is small; a matrix for each relation would not be.
        outer = jnp.einsum("...i,...j->...ij", head, relation)
        query = jnp.einsum("...ij,ijk->...k", outer, params["core"])
        return _normalize(params["query_norm"], query) if self.norm else query


@dataclasses.dataclass(frozen=True)
class ConvE(Scorer):
    """A convolution over h and r as pictures, one above the other, against t.

    Dettmers et al. 2018, https://arxiv.org/abs/1707.01476. `dim` = height x width of a picture.
    Raises UserError where height does not divide dim, or a picture is narrower than the kernel.
    """

    height: int = 10
    channels: int = 32
    kernel: int = 3
    hidden_dropout: float = 0.3
    norm: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.height:
            raise UserError(f"ConvE: dim {self.dim} is no multiple of the height {self.height}")
        if self.dim < self.height * self.kernel:
            raise UserError(
                f"ConvE: dim {self.dim} makes pictures narrower than the kernel; give "
                f"{self.height * self.kernel} or more"
            )

    def init(self, key: jax.Array) -> Params:
        params = super().init(key)
        first, second = jax.random.split(jax.random.fold_in(key, 1))
        taps, places = self.kernel**2, self._places()
        glorot = jax.nn.initializers.glorot_uniform()
        params |= {
            "bias": jnp.zeros((len(params["entity"]), 1)),
            "filters": glorot(first, (taps, self.channels)),
            "filter_bias": jnp.zeros(self.channels),
            "out": glorot(second, (places * self.channels, self.dim)),
            "out_bias": jnp.zeros(self.dim),
        }
        if self.norm:
            params |= {"picture_norm": _norm(2 * self.dim), "query_norm": _norm(self.dim)}
            params["map_norm"] = _norm(places * self.channels)
        return params

    def _places(self) -> int:
        return (2 * self.height - self.kernel + 1) * (self.dim // self.height - self.kernel + 1)

    def query(self, params: Params, h: jax.Array, r: jax.Array, rng: jax.Array | None) -> jax.Array:
        pair = jnp.broadcast_arrays(params["entity"][h], params["relation"][r])
        flat = jnp.concatenate(pair, axis=-1)
        if self.norm:
            flat = _normalize(params["picture_norm"], flat)
        flat = drop(flat, self.dropout, rng)
        picture = rearrange(flat, "... (h w) -> ... h w", h=2 * self.height)
        # One input channel: the convolution is a product with shifted pictures, which XLA's CPU
        # backend differentiates many times as fast as its convolution.
        rows, columns = (size - self.kernel + 1 for size in picture.shape[-2:])
        shifted = [
            picture[..., i : i + rows, j : j + columns]
            for i in range(self.kernel)
            for j in range(self.kernel)
        ]
        maps = jnp.einsum("k...hw,kc->...chw", jnp.stack(shifted), params["filters"])
        maps = maps + params["filter_bias"].reshape((1,) * (maps.ndim - 3) + (-1, 1, 1))
        if self.norm:
            joined = _normalize(params["map_norm"], rearrange(maps, "... c h w -> ... (c h w)"))
            maps = joined.reshape(maps.shape)
        maps = jax.nn.relu(maps)
        if rng is not None:  # whole maps are dropped
            whole = drop(jnp.ones(maps.shape[:-2]), self.dropout, rng, 2)
            maps = maps * whole[..., None, None]
        query = rearrange(maps, "... c h w -> ... (c h w)") @ params["out"]
        query = query + params["out_bias"].reshape((1,) * (query.ndim - 1) + (-1,))
        query = drop(query, self.hidden_dropout, rng, 3)
        if self.norm:
            query = _normalize(params["query_norm"], query)
        query = jax.nn.relu(query)
        return jnp.concatenate([query, jnp.ones((*query.shape[:-1], 1))], axis=-1)

    def table(self, params: Params) -> jax.Array:
        return jnp.concatenate([params["entity"], params["bias"]], axis=-1)


def _multiply(x: jax.Array, real: jax.Array, imaginary: jax.Array) -> jax.Array:
    """Complex numbers [..., 2k] (real parts, then imaginary ones) times others [..., k]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * real - b * imaginary, a * imaginary + b * real], axis=-1)


def _modulus(x: jax.Array) -> jax.Array:
    real, imaginary = jnp.split(x, 2, axis=-1)
    return jnp.sqrt(real**2 + imaginary**2 + 1e-12)


def _norm(width: int) -> Params:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _normalize(params: Params, x: jax.Array) -> jax.Array:
    """Layer normalisation over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return unit * params["scale"].reshape(shape) + params["bias"].reshape(shape)
