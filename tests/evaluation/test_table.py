import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import format_table, print_table

RESULTS = {
    "image": {"accuracy": [0.5, 0.7], "rows": [40, 40]},
    "image + text": {"accuracy": [0.8, 0.8]},
}


def test_states_data_seeds_and_spread():
    text = format_table("Subsets", RESULTS, "stamps, 40 held-out things", [3, 4])
    header, rule, image, both, _, footer = text.splitlines()
    assert {len(line) for line in (header, rule, image, both)} == {len(header)}
    assert f"0.600 ± {np.std([0.5, 0.7], ddof=1):.3f}" in image and "0.800 ± 0.000" in both
    assert footer == (
        "Data: stamps, 40 held-out things. Mean ± standard deviation over 2 seeds (3, 4)."
    )
    alone = format_table("One", {"image": {"accuracy": 0.5}}, "stamps", [7])
    assert "±" not in alone and alone.endswith("One seed (7), so no spread.")


def test_values_and_seeds_must_agree():
    with pytest.raises(UserError, match=r"2 values.*3 seeds \[0, 1, 2\]"):
        format_table("Subsets", RESULTS, "stamps", [0, 1, 2])


@pytest.mark.parametrize("terminal", [False, True])
def test_prints_on_a_terminal_and_into_a_pipe(capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    print_table("Subsets", RESULTS, "stamps", [3, 4])
    out = capsys.readouterr().out
    assert "Subsets" in out and "0.600 ± 0.141" in out and "2 seeds" in " ".join(out.split())
    assert ("| image " in out) is not terminal
