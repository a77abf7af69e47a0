"""Real weights: SmolLM2 writes what transformers.generate writes. Fifty prompts by a command:

python -m experiments.benchmarks.generation
"""

import pytest

from fusion_jax.errors import UserError


@pytest.fixture(scope="module")
def both():
    pytest.importorskip("accelerate")  # without it transformers opens no GGUF
    from experiments.benchmarks import generation

    try:
        return generation.open_both()
    except UserError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize(("count", "settings"), [(3, {}), (1, {"beams": 2})], ids=str)
def test_same_tokens_as_transformers(both, count, settings):
    """Greedily in a ragged batch, and by beam search."""
    from experiments.benchmarks.generation import QUESTIONS, compare

    same = compare(*both, QUESTIONS[-count:], max_tokens=8, **settings)
    assert same.equal == count
