"""ONNX files of exported predictors, by jax2onnx, checked by ONNX Runtime as they are written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax import attention
from fusion_jax.data.image import Pictures
from fusion_jax.deployment.predictor import Predictor
from fusion_jax.errors import UserError
from fusion_jax.paths import replacing
from fusion_jax.platforms import portable
from fusion_jax.tokens import Tokens

TOLERANCE = 1e-3
"""Largest difference of an output from ours, relative to its largest number."""


def write(target: Path, model: Any) -> float:
    """Writes an ONNX file: any batch, sound and text padded to the longest, params inside.

    Inputs are NAME and NAME_mask of each modality, outputs as in the StableHLO export.

    Returns:
        The largest difference between ONNX Runtime's outputs and ours on random inputs.

    Raises:
        UserError: no predictor; an operation that jax2onnx does not know; outputs that differ.
    """
    try:
        import jax2onnx
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"{error}: pip install 'fusion_jax[onnx]', then pip install --no-deps jax2onnx "
            "(which asks for an orbax-checkpoint older than ours, and does not need it here)"
        ) from error
    if not isinstance(model, Predictor):
        raise UserError("ONNX holds predictors; export a language model as stablehlo or gguf")
    names, specs = [], []
    for name, transform in model.inputs.items():
        shape = ("B", *transform.shape)
        names += [name, f"{name}_mask"]
        mask = shape[:1] if isinstance(transform, Pictures) else shape
        specs += [jax.ShapeDtypeStruct(shape, transform.dtype), jax.ShapeDtypeStruct(mask, bool)]

    attention.use(attention.dense_attend)  # made of operators that ONNX has

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        found = model.apply(model.params, _batch(names, arrays, model))
        return tuple(found[name] for name in sorted(found))

    rng = np.random.default_rng(0)
    samples = []
    for spec in specs:
        shape = (2, *spec.shape[1:])
        sample = rng.random(shape) < 0.9 if spec.dtype == bool else 5 * rng.random(shape)
        samples.append(sample.astype(spec.dtype))
    ours = jax.jit(run)(*map(jnp.asarray, samples))
    outputs = sorted(jax.eval_shape(model.apply, model.params, _batch(names, samples, model)))
    try:
        with portable():
            made = jax2onnx.to_onnx(run, specs, input_names=names, output_names=outputs)
    except Exception as error:  # whatever its plugins raise
        first = str(error).strip().splitlines()[0]
        raise UserError(f"jax2onnx cannot write this model: {first}; export stablehlo") from error
    session = onnxruntime.InferenceSession(made.SerializeToString())
    found = session.run(outputs, dict(zip(names, samples, strict=True)))
    scale = [max(float(np.abs(each).max()), 1e-6) for each in ours]
    worst = max(float(np.abs(a - b).max()) / s for a, b, s in zip(ours, found, scale, strict=True))
    if worst > TOLERANCE:
        raise UserError(f"ONNX Runtime's outputs differ from ours by {worst:.1e}; nothing written")
    with replacing(target) as draft:
        onnx.save(made, draft)
    return worst


def _batch(names: Sequence[str], samples: Sequence[Any], model: Predictor) -> dict[str, Tokens]:
    given = dict(zip(names, samples, strict=True))
    return {name: Tokens(given[name], given[f"{name}_mask"]) for name in model.inputs}
