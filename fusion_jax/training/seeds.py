"""Mean and spread over seeds."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table


def summarise(found: Mapping[int, Mapping[str, float]], workdir: Path) -> dict[str, list[float]]:
    """Prints mean and sample standard deviation of each metric, and writes all to seeds.json."""
    names = list(next(iter(found.values())))
    values = {name: [metrics[name] for metrics in found.values()] for name in names}
    seeds = ", ".join(map(str, found))
    table = Table("metric", "mean", "std", "per seed", title=f"{len(found)} seeds ({seeds})")
    for name, row in values.items():
        each = " ".join(f"{value:.3f}" for value in row)
        table.add_row(name, f"{np.mean(row):.4f}", f"{np.std(row, ddof=1):.4f}", each)
    Console(width=120).print(table)
    (workdir / "seeds.json").write_text(json.dumps({"seeds": list(found)} | values, indent=1))
    return values
