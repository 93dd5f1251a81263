"""Fixtures for the tests of tasks."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Use an empty cache folder, and return its subfolder for prepared data."""
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"
