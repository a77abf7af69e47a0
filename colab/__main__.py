"""Writes and runs the notebooks of this folder.

    python -m colab                # runs every notebook in full, and prints how long each took;
                                   # exits 1 if a cell of one fails
    python -m colab --only 1 --quick
    python -m colab --write        # after a .py was changed: writes the .ipynb that Colab opens

Each notebook is a Python file in percent format, which is what is edited and reviewed; the .ipynb
beside it is made of it, without outputs. Needs the extra `colab`.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
import tyro
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("[0-9]_*.py"))
QUICK = "quick = False"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to do with the notebooks."""

    only: tuple[int, ...] = ()
    """Numbers of notebooks; all without any."""
    quick: bool = False
    """In quick mode, which shows that they run and no more."""
    write: bool = False
    """Write the .ipynb files and run nothing."""


def notebook(source: Path) -> nbformat.NotebookNode:
    """The notebook of a percent-format file, the same at every call."""
    made = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return made


def write(source: Path) -> str:
    """What the .ipynb of a source holds."""
    return nbformat.writes(notebook(source)) + "\n"


def run(source: Path, *, quick: bool) -> nbformat.NotebookNode:
    """Executes all cells from the repository's root; raises CellExecutionError where one fails."""
    made = notebook(source)
    for cell in made.cells:
        if quick and QUICK in cell.source:
            cell.source = cell.source.replace(QUICK, "quick = True")
    client = nbclient.NotebookClient(
        made, timeout=3600, kernel_name="python3", resources={"metadata": {"path": FOLDER.parent}}
    )
    return client.execute()


def main(arguments: Arguments) -> int:
    """Writes or runs those that are asked for, and returns the exit status."""
    status = 0
    for source in SOURCES:
        if arguments.only and int(source.name[0]) not in arguments.only:
            continue
        if arguments.write:
            source.with_suffix(".ipynb").write_text(write(source))
            continue
        began = time.perf_counter()
        try:
            made = run(source, quick=arguments.quick)
        except CellExecutionError as error:
            print(f"== {source.stem} failed: {error}", flush=True)
            status = 1
            continue
        print(f"== {source.stem}: {time.perf_counter() - began:.0f} s", flush=True)
        for cell in made.cells:
            for output in cell.get("outputs", []):
                if output.output_type == "stream" and output.name == "stdout":
                    print(output.text, end="", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
