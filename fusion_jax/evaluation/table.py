"""Tables of results that say what they were measured on: data, seeds and spread."""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from fusion_jax.errors import UserError

Results = Mapping[str, Mapping[str, float | Sequence[float]]]


def cell(values: float | Sequence[float], seeds: Sequence[int], digits: int = 3) -> str:
    """`mean ± deviation` over the seeds; the value alone if there is one seed.

    Raises UserError if the number of values is not the number of seeds.
    """
    values = np.atleast_1d(np.asarray(values, np.float64))
    if len(values) != len(seeds):
        raise UserError(
            f"{len(values)} values were given for {len(seeds)} seeds {list(seeds)}; "
            "a table needs one value for each seed"
        )
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def footer(data: str, seeds: Sequence[int]) -> str:
    """What the numbers are: one sentence."""
    if len(seeds) == 1:
        return f"Data: {data}. One seed ({seeds[0]}), so no spread."
    named = ", ".join(map(str, seeds))
    return f"Data: {data}. Mean ± standard deviation over {len(seeds)} seeds ({named})."


def format_table(
    title: str, results: Results, data: str, seeds: Sequence[int], digits: int = 3
) -> str:
    """`results` {row: {column: value, or one value a seed}} as Markdown, columns aligned."""
    header, rows = _cells(title, results, seeds, digits)
    return "\n".join([markdown(header, rows), "", footer(data, seeds)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def print_table(
    title: str, results: Results, data: str, seeds: Sequence[int], digits: int = 3
) -> None:
    """Prints it: drawn on a terminal, as Markdown into a file or a pipe."""
    if not sys.stdout.isatty():
        print(f"{title}\n\n{format_table(title, results, data, seeds, digits)}\n")
        return
    header, rows = _cells(title, results, seeds, digits)
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(footer(data, seeds), style="dim", highlight=False)


def _cells(
    title: str, results: Results, seeds: Sequence[int], digits: int
) -> tuple[list[str], list[list[str]]]:
    if not results or not seeds:
        raise UserError(f"the table {title!r} has {len(results)} rows and {len(seeds)} seeds")
    columns = list(dict.fromkeys(name for row in results.values() for name in row))
    rows = [
        [name, *(cell(row[column], seeds, digits) if column in row else "" for column in columns)]
        for name, row in results.items()
    ]
    return ["", *columns], rows
