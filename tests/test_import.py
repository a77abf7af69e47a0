"""What a run imports, and how long the package takes to import."""

import subprocess
import sys


def test_no_torch_and_no_tensorflow_in_a_run():
    code = (
        "import sys, fusion_jax.training.loop, fusion_jax.data.stamps, fusion_jax.pretrained.tower,"
        "fusion_jax.fusion.multimodal; print([m for m in ('torch', 'tensorflow') "
        "if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_package_itself_imports_nothing():
    code = "import sys, fusion_jax; print(sorted({'jax', 'grain', 'flax'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
