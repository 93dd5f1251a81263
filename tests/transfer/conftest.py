"""Fixtures of the tests of transfer."""

import pytest


@pytest.fixture(scope="session")
def torch():
    """PyTorch, imported together with transformers once, which takes seconds; tests are skipped without."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    transformers = pytest.importorskip("transformers")
    # Their modules are imported when first asked for.
    assert transformers.ResNetForImageClassification
    assert transformers.ViTForImageClassification
    return torch
