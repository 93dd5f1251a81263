"""Fixtures of the tests of tasks."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of prepared data for one test."""
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"
