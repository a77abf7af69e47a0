"""Every family against `transformers`: outputs, gradients, and what it reads back of ours."""

import pytest

pytest.importorskip("transformers")

from experiments.benchmarks.parity import compare
from experiments.benchmarks.parity_cases import CASES


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("name", CASES)
def test_same_as_transformers(name):
    parity = compare(CASES[name]())
    assert parity.outputs < 1e-4
    assert parity.gradient < 1e-3
    assert parity.round_trip
