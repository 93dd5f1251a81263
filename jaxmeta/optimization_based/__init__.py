"""Methods that learn how to descend: one file a method, on the engine `inner_loop`."""

from jaxmeta.optimization_based.inner_loop import inner_loop
from jaxmeta.optimization_based.maml import fomaml, maml

__all__ = ["fomaml", "inner_loop", "maml"]
