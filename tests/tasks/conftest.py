"""Fixtures for the tests of tasks."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache folder for prepared data."""
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"
