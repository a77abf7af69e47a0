"""PyKEEN, imported without its dependencies' warnings."""

import importlib
import warnings

import numpy as np
import pytest


def pykeen():
    """The package with what the tests use of it imported, or the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("pykeen")
        for part in ("datasets", "evaluation", "models", "nn.modules"):
            importlib.import_module(f"pykeen.{part}")
    return module


def complex_of(halves):
    """[..., 2k] (real parts, then imaginary ones) as torch complex [..., k]."""
    import torch

    real, imaginary = np.split(np.asarray(halves), 2, axis=-1)
    return torch.complex(torch.tensor(real), torch.tensor(imaginary))
