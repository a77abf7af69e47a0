"""python -m fusion_jax train|evaluate|fetch|ask|chat ...: each command is a function below."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from fusion_jax.errors import UserError

USAGE = """usage: python -m fusion_jax COMMAND ...

  train EXPERIMENT.py [--SETTING VALUE ...]   train, or go on training; --help lists the settings
  evaluate --workdir DIR                      report on a trained workdir again
  plan [EXPERIMENT.py] --topology v5e:4x4     what a step takes of each chip; --llm gemma2-27b
  show-sharding [EXPERIMENT.py] --mesh ...    which part of each param a device holds
  compress --workdir DIR --recipe int8        write a smaller workdir, and compare
  fetch NAME                                  bring a pretrained checkpoint
  build-data "ROWS-*.jsonl" --name NAME       make a data set of millions of rows
  ask --model NAME | --workdir DIR QUESTION   ask a language model
  chat --model NAME | --workdir DIR           talk with one: text, speech, pictures
  translate --workdir DIR --to LANG TEXT|FILE translate text, speech, or both
  export --workdir DIR | --model NAME FOLDER  write a model that runs without this codebase
  serve FOLDER | --workdir DIR [--page]       serve such a folder, or a run, over HTTP
"""


def train(arguments: list[str]) -> None:
    """Trains an experiment file, one seed or several."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError("which experiment? python -m fusion_jax train experiments/NAME.py ...")
    import jax

    from fusion_jax.compression.running import running
    from fusion_jax.training import experiment as experiments
    from fusion_jax.training import hosts, loop, runtime, seeds, together

    source = Path(arguments[0])
    module = experiments.load_file(source)
    settings = tyro.cli(
        module.Settings,
        args=arguments[1:],
        prog=f"python -m fusion_jax train {source}",
        description=module.__doc__,
    )
    runtime.start(settings)
    workdir = settings.workdir or Path("runs") / source.stem

    def run(settings: module.Settings, workdir: Path) -> dict[str, float]:
        experiments.check_workdir(workdir, source, settings)
        experiment = module.build(settings)
        with experiments.open_workdir(workdir, source, settings):
            return loop.train(experiment, settings, workdir)

    with hosts.joined(settings), running():  # --base keeps what is frozen in few bits
        if settings.seeds == 1:
            run(settings, workdir)
            return
        each = {
            seed: (dataclasses.replace(settings, seed=seed), workdir / f"seed-{seed}")
            for seed in range(settings.seed, settings.seed + settings.seeds)
        }
        found = None
        if settings.together:
            for own, folder in each.values():
                experiments.check_workdir(folder, source, own)
            runs = {seed: together.Run(module.build(s), s, at) for seed, (s, at) in each.items()}
            with contextlib.ExitStack() as stack:
                for own, folder in each.values():
                    stack.enter_context(experiments.open_workdir(folder, source, own))
                found = together.train(runs)
        if found is None:
            found = {seed: run(*pair) for seed, pair in each.items()}
        if jax.process_index() == 0:
            seeds.summarise(found, workdir)


def evaluate(arguments: list[str]) -> None:
    """Reports on a trained workdir again."""
    from fusion_jax.compression.running import running
    from fusion_jax.training import experiment as experiments
    from fusion_jax.training import loop, runtime

    def parse(workdir: Path, mesh: str | None = None) -> tuple[Path, str | None]:
        """Reports on a trained workdir again.

        Args:
            workdir: what --workdir was when it was trained.
            mesh: devices along each axis, as in training: fsdp=-1 for what one cannot hold.
        """
        return workdir, mesh

    workdir, mesh = tyro.cli(parse, args=arguments, prog="python -m fusion_jax evaluate")
    runtime.start()
    module, settings = experiments.reopen(workdir, mesh)
    with running():
        loop.evaluate(module.build(settings), settings, workdir)


def plan(arguments: list[str]) -> None:
    """What a train step takes of each chip of a slice that need not be here."""
    from fusion_jax.compression.running import running
    from fusion_jax.training import plan_command

    with running():
        plan_command.main(arguments)


def show_sharding(arguments: list[str]) -> None:
    """Draws which part of each param a device holds."""
    from fusion_jax.training import show_sharding as shardings

    shardings.main(arguments)


def compress(arguments: list[str]) -> None:
    """Writes a smaller workdir, and compares it with the trained one."""
    from fusion_jax.compression import workdir
    from fusion_jax.training import runtime

    runtime.start()
    tyro.cli(workdir.compress, args=arguments, prog="python -m fusion_jax compress")


def fetch(arguments: list[str]) -> None:
    """Brings a pretrained checkpoint."""
    from fusion_jax.pretrained.fetch import fetch as bring

    def parse(name: tyro.conf.Positional[str]) -> str:
        """Brings a pretrained checkpoint, once, and prints its folder.

        Args:
            name: a short name like efficientnet-lite2, a hub name like org/model, a GGUF file
                there like org/model:file.gguf, or a folder.
        """
        return name

    print(bring(tyro.cli(parse, args=arguments, prog="python -m fusion_jax fetch")))


def build_data(arguments: list[str]) -> None:
    """Makes a TFDS data set of JSONL files, by Apache Beam."""
    from fusion_jax.data import beam

    print(tyro.cli(beam.build, args=arguments, prog="python -m fusion_jax build-data"))


def ask(arguments: list[str]) -> None:
    """Asks a language model."""
    from fusion_jax.compression.running import running
    from fusion_jax.language.ask import ask as answer
    from fusion_jax.training import runtime

    runtime.start()
    with running():
        tyro.cli(answer, args=arguments, prog="python -m fusion_jax ask")


def chat(arguments: list[str]) -> None:
    """Talks with a language model."""
    from fusion_jax.compression.running import running
    from fusion_jax.language.conversation import chat as talk
    from fusion_jax.training import runtime

    runtime.start()
    with running():
        tyro.cli(talk, args=arguments, prog="python -m fusion_jax chat")


def translate(arguments: list[str]) -> None:
    """Translates text, speech, or both."""
    from fusion_jax.compression.running import running
    from fusion_jax.language.translate import translate as write
    from fusion_jax.training import runtime

    runtime.start()
    with running():
        tyro.cli(write, args=arguments, prog="python -m fusion_jax translate")


def export(arguments: list[str]) -> None:
    """Writes a model that runs without this codebase."""
    from fusion_jax.compression.running import running
    from fusion_jax.deployment.export import export as write
    from fusion_jax.training import runtime

    runtime.start()
    with running():
        tyro.cli(write, args=arguments, prog="python -m fusion_jax export")


def serve(arguments: list[str]) -> None:
    """Serves an exported model or a trained run over HTTP."""
    try:
        from fusion_jax.deployment.runtime import command
    except ModuleNotFoundError as missing:
        needs = f"serving needs {missing.name}: pip install 'fusion_jax[serve]'"
        raise UserError(needs) from missing

    stand, asked = None, {"-h", "--help"} & set(arguments)
    if not asked and any(each.partition("=")[0] == "--workdir" for each in arguments):
        import argparse

        from fusion_jax.compression.running import running
        from fusion_jax.deployment.kept import servable
        from fusion_jax.training import runtime

        runtime.start()
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--workdir", type=Path)
        parser.add_argument("--senses", type=Path)
        runs, arguments = parser.parse_known_args(arguments)
        with running():
            found = servable(runs.workdir, runs.senses)
        if isinstance(found, Path):
            arguments = [str(found), *arguments]
        else:
            stand = found
    more = "In place of ARTIFACT: --workdir DIR, a trained run, and perhaps --senses DIR, another "
    more += "run that hears or sees for it."
    if status := command.main(arguments, "python -m fusion_jax serve", stand, more):
        raise SystemExit(status)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "plan": plan,
    "show-sharding": show_sharding,
    "compress": compress,
    "fetch": fetch,
    "build-data": build_data,
    "ask": ask,
    "chat": chat,
    "translate": translate,
    "export": export,
    "serve": serve,
}


def main(arguments: list[str]) -> int:
    """Runs a command; bad input is one line on stderr and exit status 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(f"unknown command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
        COMMANDS[arguments[0]](arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
