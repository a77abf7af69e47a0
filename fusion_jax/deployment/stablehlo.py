"""One folder that runs without this codebase: functions as StableHLO, weights, preprocessing.

artifact/
  model.json            signature, preprocessing, how conversations are written
  card.json             what it was trained on, with which settings and seed, what it scored
  *.stablehlo           functions by `jax.export`, for cpu, cuda, tpu, any batch and length
  weights.safetensors   their params: an argument, so that they can be replaced
  tokenizer.json ...    what preprocessing reads
  runtime/, serve.py    `python artifact/serve.py` needs jax, and fusion_jax not at all
  requirements.txt      what it needs, for pip
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from safetensors.numpy import save_file

from fusion_jax import attention
from fusion_jax.attention import Mask
from fusion_jax.data.audio import SAMPLE_RATE, Waveforms
from fusion_jax.data.image import Pictures
from fusion_jax.data.pipeline import Transform
from fusion_jax.data.text import FileTokenizer, Ids
from fusion_jax.deployment.predictor import Predictor
from fusion_jax.deployment.runtime.artifact import FORMAT
from fusion_jax.errors import UserError
from fusion_jax.language.answers import PLAIN
from fusion_jax.language.ask import Assistant
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.listener import Listener
from fusion_jax.language.prompt import text_mask
from fusion_jax.language.translate import forms
from fusion_jax.paths import write_folder
from fusion_jax.tokens import Tokens

try:
    from jax.errors import InconclusiveDimensionOperation
except ImportError:  # before JAX 0.10
    from jax.core import InconclusiveDimensionOperation

PLATFORMS = ("cpu", "cuda", "tpu")
SHORTEST_SOUND = 1024
"""Samples: what is shorter is padded, since convolutions need so many."""
RUNTIME = Path(__file__).with_name("runtime")
NEEDED = (
    *("numpy>=2", "flatbuffers>=24", "tokenizers>=0.21", "jinja2>=3.1", "pillow>=11"),
    *("soundfile>=0.13", "soxr>=0.5", "anyio", "starlette>=0.40", "uvicorn>=0.30"),
    *("pydantic>=2", "prometheus-client>=0.20"),
)
"""Beside JAX, by what runs an artifact."""
SERVE = '''"""Serves the model in this folder: python serve.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from runtime.command import main

sys.exit(main([str(Path(__file__).parent), *sys.argv[1:]]))
'''


@dataclasses.dataclass
class Draft:
    """What an artifact will hold: functions and params are added, then it is written."""

    folder: Path
    manifest: dict[str, Any]
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def function(
        self, name: str, run: Callable[..., Any], trees: Mapping[str, Any], *inputs: Any
    ) -> None:
        """Exports run(trees, *inputs): `trees` {prefix: params} become an argument of flat names.

        Raises:
            UserError: the function cannot be exported for shapes that are not known.
        """
        flat, rebuild = {}, {}
        for prefix, tree in trees.items():
            leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
            names = [f"{prefix}/{_name(path)}" for path, _ in leaves]
            flat |= dict(zip(names, (leaf for _, leaf in leaves), strict=True))
            rebuild[prefix] = treedef, names

        def flattened(params: dict[str, jax.Array], *inputs: Any) -> Any:
            whole = {
                prefix: jax.tree.unflatten(treedef, [params[name] for name in names])
                for prefix, (treedef, names) in rebuild.items()
            }
            return run(whole, *inputs)

        shapes = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in flat.items()}
        try:
            exported = jax_export.export(jax.jit(flattened), platforms=PLATFORMS)(shapes, *inputs)
        except (jax.errors.JAXTypeError, InconclusiveDimensionOperation) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"{name} cannot be exported for any batch and length: {first}"
            ) from error
        (self.folder / f"{name}.stablehlo").write_bytes(exported.serialize())
        self.weights |= {n: np.asarray(leaf) for n, leaf in flat.items()}
        self.manifest["functions"][name] = {
            "params": sorted(flat),
            "platforms": list(exported.platforms),
            "inputs": jax.tree.map(_described, list(inputs)),
            "outputs": jax.tree.map(
                _described, jax.tree.unflatten(exported.out_tree, exported.out_avals)
            ),
        }


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def predictor(draft: Draft, model: Predictor) -> None:
    """Adds `predict`: {name: {"values", "mask"}} -> {name: array [b, ...]}."""
    bounds, described = ["b >= 1"], {}
    for name, transform in model.inputs.items():
        described[name], more = _preprocessing(draft, name, transform)
        bounds += more
    scope = jax_export.SymbolicScope(bounds)

    def abstract(name: str) -> dict[str, jax.ShapeDtypeStruct]:
        picture = described[name]["kind"] == "image"
        length = str(described[name]["size"]) if picture else f"{name}_length"
        values = f"b, {length}, {length}, 3" if picture else f"b, {length}"
        return {
            "values": _shape(
                scope, values, jnp.int32 if described[name]["kind"] == "text" else None
            ),
            "mask": _shape(scope, "b" if picture else values, bool),
        }

    def predict(params: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, jax.Array]:
        return model.apply(params["model"], {name: Tokens(**raw[name]) for name in sorted(raw)})

    draft.manifest |= {"kind": "predict", "inputs": described, "classes": list(model.classes)}
    draft.function("predict", predict, {"model": model.params}, {n: abstract(n) for n in described})


def language_model(draft: Draft, assistant: Assistant) -> None:
    """Adds `prefill` and `decode`, and for each kind of media a function from raw data to vectors.

    prefill: ids [b, t] padded on the left, mask [b, t], media [b, m, width], caches -> logits
    [b, vocabulary] of the next token, caches. An id of -1 - i stands for media vector i.
    decode: token [b], position [b], caches -> logits, caches.

    Raises:
        UserError: it has no tokenizer; media are read by cross-attention.
    """
    fused = isinstance(assistant.model, FusedLM)
    decoder = assistant.model.decoder if fused else assistant.model
    params = assistant.params["decoder"] if fused else assistant.params
    if fused and assistant.model.cross is not None:
        raise UserError("a model with gated cross-attention cannot be exported: use a connector")
    missing = sorted(set(assistant.readers) - set(assistant.encoders))
    if missing:
        raise UserError(f"the assistant says no function for {missing}: give Assistant.encoders")
    prefix = fused and assistant.model.prefix
    reading = jax_export.SymbolicScope(["b >= 1", "t >= 2", "s >= t + 1", "m >= 1"])
    writing = jax_export.SymbolicScope(["b >= 1", "s >= 2"])
    # Full length in every layer: where a window is shorter than this, positions tell.
    empty = jax.eval_shape(lambda: decoder.empty_caches(1, 1))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(empty)
    names = [_name(path) for path, _ in leaves]

    def lengthened(leaf: jax.ShapeDtypeStruct, scope: Any) -> jax.ShapeDtypeStruct:
        shape = [str(dim) for dim in leaf.shape]
        if shape:
            batch = -4 if jnp.issubdtype(leaf.dtype, jnp.floating) else -2
            shape[batch], shape[batch + 1] = "b", "s"
        return _shape(scope, ", ".join(shape), leaf.dtype)

    def abstract(scope: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return {n: lengthened(leaf, scope) for n, (_, leaf) in zip(names, leaves, strict=True)}

    def packed(caches: Any) -> dict[str, jax.Array]:
        return dict(zip(names, jax.tree.leaves(caches), strict=True))

    def unpacked(caches: Mapping[str, jax.Array]) -> Any:
        return jax.tree.unflatten(treedef, [caches[name] for name in names])

    def prefill(trees, ids, mask, media, caches):  # noqa: ANN001, ANN202
        weights = {"params": trees["decoder"]}
        vectors = decoder.apply(weights, jnp.where(mask & (ids >= 0), ids, 0), method="embed")
        place = (-1 - ids).clip(0, media.shape[1] - 1)[:, :, None]
        placed = jnp.take_along_axis(media, place, axis=1).astype(vectors.dtype)
        vectors = jnp.where((ids < 0)[:, :, None], placed, vectors)
        hidden, caches = decoder.apply(
            weights,
            vectors,
            text_mask(mask, prefix=mask if prefix else None),
            caches=unpacked(caches),
        )
        logits = decoder.apply(weights, hidden[:, -1:], method="logits")[:, 0]
        return logits, packed(caches)

    def decode(trees, token, position, caches):  # noqa: ANN001, ANN202
        weights, where = {"params": trees["decoder"]}, position[:, None]
        hidden, caches = decoder.apply(
            weights, token[:, None], Mask(where, where, causal=True), caches=unpacked(caches)
        )
        return decoder.apply(weights, hidden, method="logits")[:, 0], packed(caches)

    trees = {"decoder": params}
    ids, mask = _shape(reading, "b, t", jnp.int32), _shape(reading, "b, t", bool)
    media = _shape(reading, f"b, m, {decoder.width}")
    draft.function("prefill", prefill, trees, ids, mask, media, abstract(reading))
    token = _shape(writing, "b", jnp.int32)
    draft.function("decode", decode, trees, token, token, abstract(writing))
    described = {name: _medium(draft, assistant, name) for name in assistant.encoders}
    chat = assistant.chat
    chat.tokenizer.save(str(draft.folder / "tokenizer.json"))
    if chat.template is not None:
        (draft.folder / "chat_template.jinja").write_text(chat.template)
    if assistant.languages:
        draft.manifest["translation"] = forms(assistant.languages)
    draft.manifest |= {
        "kind": "generate",
        "turns": chat.template not in (None, PLAIN),
        "inputs": described,
        "width": decoder.width,
        "vocabulary": decoder.vocabulary,
        "context_length": decoder.context_length,
        "special": dict(chat.special),
        "stop_ids": list(chat.stop_ids),
        "caches": {name: _described(leaf) for name, leaf in abstract(writing).items()},
    }


def _medium(draft: Draft, assistant: Assistant, name: str) -> dict[str, Any]:
    """Adds the function `name`: raw items [b, ...] -> vectors [b, n, width], real, scores."""
    encoder, model = assistant.encoders[name], assistant.model
    described, bounds = _preprocessing(draft, name, encoder.transform)
    scope = jax_export.SymbolicScope(["b >= 1", *bounds])
    connector = model.connectors[name]
    if (most := getattr(connector, "most", None)) is not None:
        # One more vector than is read shows what has too many.
        described["most"] = most
        model = model.clone(connectors={**model.connectors, name: connector.clone(most=most + 1)})
    own = {
        key: assistant.params[key]
        for key in (f"connectors_{name}", f"encoders_{name}")
        if key in assistant.params
    }

    def see(trees, raw):  # noqa: ANN001, ANN202
        tokens, scores = encoder.apply(trees[name], Tokens(**raw))
        media = {name: jax.tree.map(lambda leaf: leaf[:, None], tokens)}
        params = trees["connector"] | {part: trees[part] for part in reads}
        connected = model.apply({"params": params}, media, method="connect")[name]
        found = {"vectors": connected.values, "real": connected.mask}
        return found if scores is None else found | {"scores": scores}

    if described["kind"] == "image":
        side = described["size"]
        values, mask = f"b, {side}, {side}, 3", "b"
    else:
        values = mask = f"b, {name}_length"
    raw = {"values": _shape(scope, values), "mask": _shape(scope, mask, bool)}
    # What hears words has them read and judged by the language model.
    reads = {"decoder": assistant.params["decoder"]} if isinstance(connector, Listener) else {}
    draft.function(name, see, {name: encoder.params, "connector": own, **reads}, raw)
    if encoder.words is not None:
        described["words"] = {"labels": list(encoder.words), "count": encoder.count}
    return described


def _preprocessing(
    draft: Draft, name: str, transform: Transform
) -> tuple[dict[str, Any], list[str]]:
    """What the runtime does to raw data as JSON, and the bounds of their length."""
    if isinstance(transform, Pictures):
        return {"kind": "image", "size": transform.size}, []
    longest = transform.shape[0]
    bounds = [f"{name}_length <= {longest}"]
    if isinstance(transform, Waveforms):
        bounds += [f"{name}_length >= {SHORTEST_SOUND}"]
        described = {"kind": "audio", "rate": SAMPLE_RATE, "shortest": SHORTEST_SOUND}
    elif isinstance(transform, Ids):
        bounds += [f"{name}_length >= 1"]
        described = {"kind": "text", "tokenizer": None}
        if isinstance(transform.tokenizer, FileTokenizer):
            described["tokenizer"] = f"{name}_tokenizer.json"
            (draft.folder / described["tokenizer"]).write_text(transform.tokenizer.json())
    else:
        raise UserError(f"{name}: cannot export the preprocessing {type(transform).__name__}")
    return described | {"longest": longest}, bounds


def _shape(scope: Any, letters: str, dtype: Any = None) -> jax.ShapeDtypeStruct:
    shape = jax_export.symbolic_shape(letters, scope=scope)
    return jax.ShapeDtypeStruct(shape, dtype or jnp.float32)


def _described(leaf: Any) -> dict[str, Any]:
    return {"shape": [_dim(dim) for dim in leaf.shape], "dtype": jnp.dtype(leaf.dtype).name}


def _dim(dim: Any) -> int | str:
    return dim if isinstance(dim, int) else str(dim)


def write(
    folder: Path,
    name: str,
    model: Predictor | Assistant,
    card: Mapping[str, Any],
    shared: bool = False,
) -> dict[str, Any]:
    """Writes the artifact; it appears when it is complete. Returns the manifest.

    Args:
        shared: whether what somebody else wrote there meanwhile is as good.

    Raises:
        UserError: the folder exists, or does by now, and is not `shared`; the model cannot be
            exported.
    """
    if folder.exists() and not shared:
        raise UserError(f"{folder} exists already: give another folder, or remove it")
    attention.use(attention.dense_attend)  # which every platform has
    with write_folder(folder, shared) as place:
        draft = Draft(place, {"format": FORMAT, "name": name, "functions": {}})
        (predictor if isinstance(model, Predictor) else language_model)(draft, model)
        save_file(draft.weights, place / "weights.safetensors")
        (place / "weights.safetensors").chmod(0o644)
        checksum = hashlib.sha256((place / "weights.safetensors").read_bytes()).hexdigest()
        count = sum(math.prod(leaf.shape) for leaf in draft.weights.values())
        draft.manifest["version"] = checksum[:12]
        about = {"name": name, "weights_sha256": checksum, "params": count, "jax": jax.__version__}
        about |= {
            "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "data": model.data,
        }
        (place / "card.json").write_text(json.dumps(about | dict(card), indent=1))
        (place / "model.json").write_text(json.dumps(draft.manifest, indent=1))
        (place / "serve.py").write_text(SERVE)
        needed = (f"jax>={jax.__version__}", *NEEDED)
        (place / "requirements.txt").write_text("".join(f"{name}\n" for name in needed))
        shutil.copytree(RUNTIME, place / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    return draft.manifest
