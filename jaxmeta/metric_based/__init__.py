"""Methods that learn a distance: a query is named by the examples, or classes, that it is nearest to."""

from jaxmeta.metric_based.kernel import Similarity, kernel_classifier
from jaxmeta.metric_based.matching import matching
from jaxmeta.metric_based.pretrained import fine_tuned_head, simple_shot
from jaxmeta.metric_based.prototypical import add_class, prototypical
from jaxmeta.metric_based.relation import relation
from jaxmeta.metric_based.ridge import ridge
from jaxmeta.metric_based.siamese import siamese

__all__ = [
    "Similarity",
    "add_class",
    "fine_tuned_head",
    "kernel_classifier",
    "matching",
    "prototypical",
    "relation",
    "ridge",
    "siamese",
    "simple_shot",
]
