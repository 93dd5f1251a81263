"""Methods whose network itself learns from what it is shown: memories and fast weights."""

from jaxmeta.model_based.mann import mann
from jaxmeta.model_based.metanet import metanet

__all__ = ["mann", "metanet"]
