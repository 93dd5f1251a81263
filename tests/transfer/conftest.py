"""Fixtures for the tests of transfer learning."""

import pytest


@pytest.fixture(scope="session")
def torch():
    """Return PyTorch, imported with transformers once, which takes seconds; skip tests without them."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    transformers = pytest.importorskip("transformers")
    # transformers imports its modules lazily; import them now.
    assert transformers.ResNetForImageClassification
    assert transformers.ViTForImageClassification
    return torch
