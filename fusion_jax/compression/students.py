"""A smaller model in place of a trained one: of the same family, in the same experiment.

    smaller = narrowed(trained, 0.5, folder, calibration)    # half of the heads and MLP channels
    smaller = shallower(trained, 0.5, folder)                # every second layer

The experiment is built again around a checkpoint folder that holds the smaller language model, so
all that opens a run opens the smaller one. Where there is no language model, the setting `width`
is what gets smaller, and the student starts fresh.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.compression.quantization import Params, is_compressed
from fusion_jax.compression.recipes import Calibration
from fusion_jax.compression.structured import keep, keep_layers, least_needed, spread
from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.pretrained.load import Computing, Pretrained, describe, load
from fusion_jax.pretrained.save import save
from fusion_jax.training.experiment import Experiment, language_model_setting
from fusion_jax.training.settings import Settings


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment with its settings, and params.

    Attributes:
        params: all of them, or None for a student that starts as its experiment says.
        cut: whether parts of its language model were removed.
    """

    module: ModuleType
    settings: Settings
    params: Params | None
    cut: bool = False

    @cached_property
    def experiment(self) -> Experiment:
        """What the experiment's file builds of the settings."""
        return self.module.build(self.settings)

    def changed(self, **settings: Any) -> "Run":
        """The run with other settings."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **settings))

    def told(self, changes: Sequence[str]) -> "Run":
        """The run with settings changed by lines like "steps=300", read as `train` reads them.

        Raises:
            UserError: a line without "=".
        """
        flags = []
        for change in changes:
            name, equals, value = change.partition("=")
            if not equals:
                raise UserError(f"--student {change}: expected NAME=VALUE, like steps=300")
            flags += [f"--{name}", *value.split(",")]
        cls, about = self.module.Settings, "compress ... --student NAME=VALUE"
        settings = tyro.cli(cls, default=self.settings, args=flags, prog=about)
        return dataclasses.replace(self, settings=settings)


def narrowed(run: Run, share: float, folder: Path, calibration: Calibration) -> Run:
    """The run with a share of its language model's heads and MLP channels, those that write most.

    Args:
        folder: gets the smaller language model as a checkpoint; must not exist.
        calibration: what the layers read decides what is kept.

    Raises:
        UserError: no language model, or one that cannot be cut.
    """
    if share == 1:
        return run
    own = LanguageModel.of(run)
    inputs = {
        path.removeprefix(own.prefix): read for path, read in calibration.inputs(run.params).items()
    }

    def cut(decoder: Decoder, params: Params) -> tuple[Decoder, Params, dict[str, Any]]:
        chosen = least_needed(decoder, params, heads=1 - share, channels=1 - share, inputs=inputs)
        smaller, params = keep(decoder, params, *chosen)
        attention = smaller.blocks[0].keywords["attention"].keywords
        sizes = {
            "num_attention_heads": attention["heads"],
            "num_key_value_heads": attention["kv_heads"],
            "head_dim": attention["head_dim"],
            "intermediate_size": len(chosen[1][0]),
        }
        return smaller, params, own.checkpoint.config | sizes

    return own.replaced(run, cut, folder)


def shallower(run: Run, share: float, folder: Path) -> Run:
    """The run with a share of its language model's layers, evenly spread, the last among them.

    Without a language model: with a share of its `width`, not trained yet.

    Raises:
        UserError: neither; a model whose layers are scanned.
    """
    if share == 1:
        return run
    if language_model_setting(run.settings) is None:
        if not hasattr(run.settings, "width"):
            raise UserError(
                "the experiment has no language model and no width to shrink: say what the student "
                "is, like --recipe distil --student hidden=64"
            )
        width = max(1, round(share * run.settings.width))
        return dataclasses.replace(run.changed(width=width), params=None)
    own = LanguageModel.of(run)

    def cut(decoder: Decoder, params: Params) -> tuple[Decoder, Params, dict[str, Any]]:
        total = len(decoder.blocks)
        kept = spread(total, max(1, round(share * total)))
        smaller, params = keep_layers(decoder, params, kept)
        return smaller, params, _with_layers(own.checkpoint.config, decoder, kept)

    return own.replaced(run, cut, folder)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Where a run has its language model.

    Attributes:
        setting: that names it.
        checkpoint: that it started from.
        prefix, adapters: of its paths in the params, and of those of LoRA's adapters for it.
    """

    setting: str
    checkpoint: Pretrained
    prefix: str
    adapters: str

    @classmethod
    def of(cls, run: Run) -> "LanguageModel":
        """Raises UserError where there is none that can be made smaller."""
        setting = language_model_setting(run.settings)
        if setting is None:
            raise UserError("the experiment has no language model whose heads could be removed")
        checkpoint = load(getattr(run.settings, setting))
        if not isinstance(checkpoint.module, Decoder) or checkpoint.module.scan:
            raise UserError(
                f"{getattr(run.settings, setting)} cannot be made smaller: it is no decoder, or was"
                " trained with --scan, which keeps its layers stacked"
            )
        flat, wanted = flatten_dict(run.params, sep="/"), flatten_dict(checkpoint.params, sep="/")
        ends = [
            path[: -len("embedding/embedding")] for path in flat if path.endswith("g/embedding")
        ]
        found = [
            prefix
            for prefix in ends
            if {p.removeprefix(prefix) for p in flat if p.startswith(prefix)} == set(wanted)
        ]
        if not found:
            raise UserError(
                "the run's language model has other params than its checkpoint (layers were added "
                "to it): it cannot be made smaller"
            )
        prefix = found[0]
        if any(is_compressed(flat[prefix + path]) for path in wanted):
            raise UserError("the language model is in few bits already: cut it before, not after")
        return cls(setting, checkpoint, prefix, prefix.replace("base/", "lora/", 1))

    def replaced(
        self,
        run: Run,
        cut: Callable[[Decoder, Params], tuple[Decoder, Params, Mapping[str, Any]]],
        folder: Path,
    ) -> Run:
        """The run around a smaller language model, which `folder` gets.

        Args:
            cut: (decoder, params with adapters beside their kernels) -> the same, smaller, and the
                config.json of it.
        """
        flat = flatten_dict(run.params, sep="/")
        mine = {p: leaf for p, leaf in flat.items() if p.startswith((self.prefix, self.adapters))}
        tails = {
            p.removeprefix(self.prefix).removeprefix(self.adapters): x for p, x in mine.items()
        }
        smaller, params, config = cut(self.checkpoint.module, unflatten_dict(tails, sep="/"))
        rest = {path: leaf for path, leaf in flat.items() if path not in mine}
        base, adapters = {}, {}
        for path, leaf in flatten_dict(params, sep="/").items():
            (adapters if path.rpartition("/")[2].startswith("lora_") else base)[path] = leaf
        _check(config, smaller, base, folder)
        described = self.checkpoint.tokenizer, self.checkpoint.chat_template
        save(folder, unflatten_dict(base, sep="/"), config, None, *described)
        rest |= {self.prefix + path: leaf for path, leaf in base.items()}
        rest |= {self.adapters + path: leaf for path, leaf in adapters.items()}
        changed = run.changed(**{self.setting: str(folder)})
        return dataclasses.replace(changed, params=unflatten_dict(rest, sep="/"), cut=True)


def _window(decoder: Decoder, index: int) -> int | None:
    return decoder.blocks[index].keywords["attention"].keywords.get("window")


def _with_layers(config: Mapping[str, Any], decoder: Decoder, kept: list[int]) -> dict[str, Any]:
    """The config.json of those of the decoder's layers alone."""
    config = {**config, "n_layer" if "n_layer" in config else "num_hidden_layers": len(kept)}
    windows = [_window(decoder, index) for index in range(len(decoder.blocks))]
    if "layer_types" in config or len(set(windows)) > 1:
        local, everywhere = "sliding_attention", "full_attention"
        config["layer_types"] = [local if windows[index] else everywhere for index in kept]
    return config


def _check(config: Mapping[str, Any], decoder: Decoder, params: Params, folder: Path) -> None:
    """Raises UserError if the family's config.json cannot say what the smaller model is."""
    _, module, _, shapes = describe(config, None, folder, Computing())
    same = {path: tuple(leaf.shape) for path, leaf in shapes.items()} == {
        path: tuple(leaf.shape) for path, leaf in params.items()
    }
    layers = range(len(decoder.blocks))
    if not same or any(_window(module, i) != _window(decoder, i) for i in layers):
        raise UserError(
            f"config.json of {config['model_type']} has no words for such a smaller model: "
            "distil to fewer layers instead of removing heads, or the reverse"
        )


def parse(name: str) -> tuple[str, float] | None:
    """("distil" or "structured", share that is kept) of a recipe of this file; None for another.

    Raises:
        UserError: a share that is not above 0 and at most 1.
    """
    kind, _, rest = name.partition("-")
    if kind not in ("distil", "structured"):
        return None
    if kind == "distil" and not rest:
        return kind, 1.0
    try:
        share = float(rest)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"recipe {name!r}: expected a share that is kept, like {kind}-0.5")
    return kind, share
