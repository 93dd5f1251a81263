"""Methods that learn how to descend: one file a method, on the engine `inner_loop`."""

from jaxmeta.optimization_based.anil import anil
from jaxmeta.optimization_based.boil import boil
from jaxmeta.optimization_based.cavia import cavia
from jaxmeta.optimization_based.evolution import evolution_gradient, persistent_evolution
from jaxmeta.optimization_based.imaml import imaml
from jaxmeta.optimization_based.inner_loop import inner_loop
from jaxmeta.optimization_based.learned_optimizer import (
    learned_optimizer,
    learned_optimizer_as_optax,
    learned_optimizer_unroll,
)
from jaxmeta.optimization_based.lstm_meta_learner import lstm_meta_learner
from jaxmeta.optimization_based.maml import fomaml, maml
from jaxmeta.optimization_based.maml_plus_plus import maml_plus_plus
from jaxmeta.optimization_based.meta_sgd import meta_sgd
from jaxmeta.optimization_based.reptile import reptile

__all__ = [
    "anil",
    "boil",
    "cavia",
    "evolution_gradient",
    "fomaml",
    "imaml",
    "inner_loop",
    "learned_optimizer",
    "learned_optimizer_as_optax",
    "learned_optimizer_unroll",
    "lstm_meta_learner",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "persistent_evolution",
    "reptile",
]
