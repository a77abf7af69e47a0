"""ONNX: what ONNX Runtime computes is what we compute."""

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_predicts_the_same(classifier, assistant, tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    from fusion_jax.deployment import onnx

    onnx.write(tmp_path / "a.onnx", classifier)
    session = runtime.InferenceSession(str(tmp_path / "a.onnx"))
    rng = np.random.default_rng(1)
    raw = {
        "image": Tokens(rng.random((3, 8, 8, 3), np.float32), np.array([True, False, True])),
        "audio": Tokens(rng.normal(size=(3, 4000)).astype(np.float32), rng.random((3, 1)) < 0.5),
        "text": Tokens(rng.integers(3, 99, (3, 24)).astype(np.int32), rng.random((3, 24)) < 0.5),
    }
    raw["audio"] = raw["audio"].replace(mask=np.broadcast_to(raw["audio"].mask, (3, 4000)).copy())
    given = {name: tokens.values for name, tokens in raw.items()}
    given |= {f"{name}_mask": tokens.mask for name, tokens in raw.items()}
    (found,) = session.run(["logits"], given)
    expected = classifier.apply(classifier.params, raw)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match="predictors"):
        onnx.write(tmp_path / "b.onnx", assistant)
