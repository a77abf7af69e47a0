"""How fast is link prediction here, against PyKEEN in PyTorch, and how good on the same split?

    python -m experiments.benchmarks.link_prediction speed      (needs the test extra: pykeen)
    python -m experiments.benchmarks.link_prediction large      (this codebase alone)
    python -m experiments.benchmarks.link_prediction quality

speed: the same scorer, width, batch size, loss and optimizer, reciprocal relations in both, CPU, in
one run, the best of several epochs after the first; making batches is part of it. A fact
counts once though it is read in both directions. The large graph has FB15k-237's 14,541 entities
and 237 relations and 10,000 random facts.

large: all 272,115 facts of a graph of FB15k-237's size, random: one epoch of ComplEx, k-vs-all, dim
200, and the memory that the process had at most: 379 s and 0.5 GiB (2 cores, shared with others).

quality: test MRR on UMLS, Kinships and Nations, trained here with the tuned settings, and of
PyKEEN's models beside, with the same width, learning rate, loss (softmax, where that is 1-vs-all or
adversarial), batch size and steps, and PyKEEN's own normalisation and dropout; it has no N3 penalty
and no dropout on factors, so this is no tuned PyKEEN.

Here and PyKEEN, one seed:

                UMLS           Kinships       Nations
    complex     0.956  0.541   0.885  0.673   0.815  0.599
    simple      0.955  0.478   0.873  0.495   0.809  0.701
    conve       0.951  0.924   0.837  0.774   0.838  0.789
    rotate      0.946  0.839   0.860  0.714   0.786  0.719
    distmult    0.915  0.788   0.663  0.516   0.793  0.677
    tucker      0.915  0.893   0.890  0.835   0.796  0.734
    transe      0.825  0.660   0.471  0.300   0.546  0.532
"""

import dataclasses
import json
import math
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

from experiments.benchmarks.rows import Row
from experiments.link_prediction import SCORERS, Settings, read_graph
from experiments.link_prediction_sweep import measure, train
from fusion_jax.data.lines import read_jsonl
from fusion_jax.evaluation.table import print_table
from fusion_jax.knowledge.batches import Facts
from fusion_jax.knowledge.graph import Graph, make
from fusion_jax.knowledge.read import BENCHMARKS
from fusion_jax.knowledge.scorers import ComplEx, Scorer
from fusion_jax.objectives.knowledge import k_vs_all, self_adversarial
from fusion_jax.training.step import State, make_step, many_steps

NAMES = {
    "transe": "TransE",
    "rotate": "RotatE",
    "distmult": "DistMult",
    "complex": "ComplEx",
    "simple": "SimplE",
    "tucker": "TuckER",
    "conve": "ConvE",
}
COMPLEX = ("rotate", "complex", "simple")  # PyKEEN counts complex numbers and pairs
DIM, NEGATIVES, MARGIN, RATE = 200, 64, 9.0, 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    graph: Graph
    scorer: str
    loss: str
    batch_size: int = 256


def random_graph(facts: int, entities: int = 14_541, relations: int = 237) -> Graph:
    """Random facts among so many entities (by default as many as FB15k-237 has)."""
    rng = np.random.default_rng(0)
    triples = rng.integers(0, (entities, relations, entities), (facts, 3))
    return make(triples, list(map(str, range(entities))), list(map(str, range(relations))))


def our_epochs(case: Case, count: int) -> list[float]:
    """Seconds of each epoch here."""
    sizes = {"entities": len(case.graph.entities), "relations": 2 * len(case.graph.relations)}
    scorer: Scorer = SCORERS[case.scorer](**sizes, dim=DIM)
    queries = case.loss == "k-vs-all"
    objective = k_vs_all(scorer) if queries else self_adversarial(scorer, NEGATIVES, MARGIN)
    data = Facts(case.graph, case.batch_size, queries=queries)
    optimizer = optax.adam(RATE)
    advance = many_steps(make_step(objective, optimizer))
    params = scorer.init(jax.random.key(0))
    state = State(np.int32(0), np.int32(0), params, optimizer.init(params))
    seconds, number = [], 0
    for _ in range(count):
        began = time.perf_counter()
        state = advance(state, [data[i] for i in range(number, number + data.steps_per_epoch)])
        number += data.steps_per_epoch
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return seconds


def their_loop(
    case: Case, loss: Any, loop: str, dim: int, rate: float = RATE, **more: Any
) -> tuple[Any, Any]:
    """A training loop of PyKEEN, and its triples factory."""
    import torch
    from pykeen.models import model_resolver
    from pykeen.training import training_loop_resolver
    from pykeen.triples import TriplesFactory

    graph = case.graph
    factory = TriplesFactory(
        torch.tensor(graph.part("train"), dtype=torch.long),
        entity_to_id={name: i for i, name in enumerate(graph.entities)},
        relation_to_id={name: i for i, name in enumerate(graph.relations)},
        create_inverse_triples=True,
    )
    width = dim // 2 if case.scorer in COMPLEX else dim
    model = model_resolver.make(
        NAMES[case.scorer], triples_factory=factory, embedding_dim=width, loss=loss, random_seed=0
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    made = training_loop_resolver.make(
        loop, model=model, triples_factory=factory, optimizer=optimizer, **more
    )
    return made, factory


def their_epochs(case: Case, count: int) -> list[float]:
    """Seconds of each epoch in PyKEEN."""
    from pykeen.losses import BCEWithLogitsLoss, NSSALoss
    from pykeen.training.callbacks import TrainingCallback

    if case.loss == "k-vs-all":
        loop, factory = their_loop(case, BCEWithLogitsLoss(), "lcwa", DIM)
    else:
        loss = NSSALoss(margin=MARGIN, adversarial_temperature=1.0)
        sampler = {"num_negs_per_pos": NEGATIVES}
        loop, factory = their_loop(case, loss, "slcwa", DIM, negative_sampler_kwargs=sampler)
    ends = []

    class Clock(TrainingCallback):
        def post_epoch(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    loop.train(factory, num_epochs=count, batch_size=case.batch_size, callbacks=Clock, **QUIET)
    return np.diff(ends).tolist()


QUIET = {"use_tqdm": False, "use_tqdm_batch": False}


def rows(
    repeats: int = 4,
    graphs: tuple[str, ...] = ("umls", "large"),
    scorers: tuple[str, ...] = ("complex", "distmult", "rotate"),
) -> Iterator[Row]:
    """Facts per second here and in PyKEEN.

    Args:
        repeats: timed epochs of each, after one to warm up.
        graphs: umls, or large.
        scorers: which.
    """
    warnings.simplefilter("ignore")
    for name in graphs:
        graph = read_graph("umls") if name == "umls" else random_graph(10_000)
        for scorer in scorers:
            for loss in ("k-vs-all", "negatives"):
                if loss == "k-vs-all" and scorer == "rotate" and name == "large":
                    continue  # PyKEEN would need entities x batch x dim numbers at once
                case = Case(graph, scorer, loss)
                here = min(our_epochs(case, repeats + 1)[1:])
                theirs = min(their_epochs(case, repeats + 1))
                job = f"{name}, {NAMES[scorer]}, {loss}"
                yield Row(job, "facts/s", len(graph) / here, len(graph) / theirs, "PyKEEN")


def speed(repeats: int = 4) -> None:
    """Facts per second here and in PyKEEN.

    Args:
        repeats: timed epochs of each, after one to warm up.
    """
    for row in rows(repeats):
        print(row, flush=True)


def large() -> None:
    """One epoch of ComplEx k-vs-all on a graph of FB15k-237's size."""
    graph = random_graph(272_115)
    scorer = ComplEx(len(graph.entities), 2 * len(graph.relations), dim=DIM)
    data = Facts(graph, 512, queries=True)
    optimizer = optax.adam(RATE)
    step = jax.jit(make_step(k_vs_all(scorer), optimizer), donate_argnums=0)
    params = scorer.init(jax.random.key(0))
    state = State(np.int32(0), np.int32(0), params, optimizer.init(params))
    state = step(state, {}, data[0])[0]
    began = time.perf_counter()
    for number in range(data.steps_per_epoch):
        state, metrics = step(state, {}, data[number])
        if number % 100 == 0:
            print(number, data.steps_per_epoch, float(metrics["loss"]), flush=True)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"ComplEx, k-vs-all, dim {DIM}, {data.rows:,} queries of {len(graph):,} random facts:"
        f" {seconds:.0f} s an epoch, {len(graph) / seconds:,.0f} facts/s, {peak:.1f} GiB at most"
    )


def quality(
    datasets: tuple[str, ...] = BENCHMARKS,
    scorers: tuple[str, ...] = tuple(NAMES),
    log: Path = Path("runs/link_prediction_quality.jsonl"),
) -> None:
    """Test MRR here and of PyKEEN's models on the same splits, seed 0.

    Args:
        datasets: which.
        scorers: which.
        log: every model's; what is there already under the same settings is not trained again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    done = [row for _, row in read_jsonl(log)] if log.exists() else []
    for row in done:
        row["settings"] = Settings.recorded(row["settings"])
    found: dict[str, dict[str, float]] = {scorer: {} for scorer in scorers}
    for dataset in datasets:
        for scorer in scorers:
            s = Settings(dataset=dataset, scorer=scorer)
            for name, measured in (("here", our_quality), ("PyKEEN", their_quality)):
                key = {"by": name, "settings": s.identity()}
                earlier = [row for row in done if {k: row[k] for k in key} == key]
                if not earlier:
                    began = time.perf_counter()
                    row = {"MRR": measured(s), "seconds": time.perf_counter() - began}
                    earlier = [key | row]
                    with log.open("a") as file:
                        file.write(json.dumps(earlier[0]) + "\n")
                mrr, seconds = earlier[0]["MRR"], earlier[0]["seconds"]
                print(f"{dataset}, {scorer}, {name}: {mrr:.4f} ({seconds:.0f} s)", flush=True)
                found[scorer][f"{dataset}, {name}"] = mrr
    about = "test facts, filtered, realistic ranks, heads and tails"
    print_table("MRR here and in PyKEEN", found, about, [0])


def our_quality(s: Settings) -> float:
    """Test MRR of the settings, trained here."""
    return measure(s, next(train(s, [s.seed])), "test")["MRR"]


def their_quality(s: Settings) -> float:
    """Test MRR of PyKEEN's model of the same name."""
    import torch
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.losses import BCEWithLogitsLoss, CrossEntropyLoss

    graph = read_graph(s.dataset)
    loss = BCEWithLogitsLoss() if s.loss == "binary" else CrossEntropyLoss()
    case = Case(graph, s.scorer, s.loss, s.batch_size)
    loop, factory = their_loop(case, loss, "lcwa", s.dim, s.learning_rate)
    epochs = math.ceil(s.steps / Facts(graph, s.batch_size, queries=True).steps_per_epoch)
    loop.train(factory, num_epochs=epochs, batch_size=s.batch_size, **QUIET)
    test, *known = (
        torch.tensor(graph.part(split), dtype=torch.long) for split in ("test", "train", "valid")
    )
    found = RankBasedEvaluator(filtered=True).evaluate(
        loop.model, test, additional_filter_triples=known, batch_size=64, use_tqdm=False
    )
    return float(found.get_metric("both.realistic.inverse_harmonic_mean_rank"))


def main() -> None:
    warnings.simplefilter("ignore")
    tyro.extras.subcommand_cli_from_dict({"speed": speed, "large": large, "quality": quality})


if __name__ == "__main__":
    main()
