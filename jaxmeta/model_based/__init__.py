"""Methods whose network itself learns from what it is shown: memories and fast weights."""

from jaxmeta.model_based.mann import mann

__all__ = ["mann"]
