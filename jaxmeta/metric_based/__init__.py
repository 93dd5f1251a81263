"""Methods that learn a distance: a query is classified by the examples, or classes, that are nearest to it.

| learner | how a query is classified |
| --- | --- |
| `kernel_classifier` | its label is the mean of the support set's, weighted by a kernel; most of the others are its instances |
| `prototypical` | a class is the mean of its embedded examples; or, zero-shot, an embedding of its metadata (Snell et al. 2017) |
| `matching` | attention over the support set, by cosines; with full context embeddings by `context_steps` (Vinyals et al. 2016) |
| `siamese` | a network scores whether two images show the same class, and a query gets the class of its best match (Koch et al. 2015) |
| `relation` | a network scores how alike a query and a class are (Sung et al. 2018) |
| `ridge` | R2-D2: ridge regression in closed form on a learned embedding (Bertinetto et al. 2019) |
| `mahalanobis` | by a distance with the regularised covariance of each class, as in Simple CNAPS (Bateni et al. 2020) |
| `soft_kmeans` | a class is a mean of its examples and of the queries that are near them (Ren et al. 2018) |
| `label_propagation` | labels spread over a graph of support set and queries (Zhou et al. 2004, Liu et al. 2019) |
| `simple_shot` | baseline: the nearest centroid on the features of an ordinary classifier (Wang et al. 2019) |
| `fine_tuned_head` | baseline: a new linear or cosine head on such features, Baseline and Baseline++ (Chen et al. 2019) |

P(y|x, S) = Σ k(x, x_i) y_i: a query's label is a mean of the support set's, weighted by a kernel of
embeddings. `kernel_classifier` takes similarity, normalisation and reduction as arguments; its documentation
states which arguments give which method. `notebooks/distances_and_prototypes.py` draws one task under each.

Train with more ways than at test, with the batch statistics of each task; then compute those of the training
tasks (`jm.calibrate`), so that each prediction depends on the support set and its own image alone:

>>> import functools
>>> import jax
>>> import numpy as np
>>> import optax
>>> import jaxmeta as jm
>>> labels = np.repeat(np.arange(50), 10)  # 50 classes of 10 examples, each class around its own centre
>>> rng = np.random.default_rng(0)
>>> x = (rng.normal(size=(50, 8))[labels] + 0.3 * rng.normal(size=(500, 8))).astype(np.float32)
>>> make_tasks = functools.partial(jm.tasks.from_arrays, x, labels, classes=(0.5, 0.0, 0.5))
>>> training_tasks = make_tasks(split="train", ways=20, shots=1, queries=3)
>>> network = jm.nn.MLP(out=16, hidden=(64,), norm=True)
>>> learner = jm.prototypical(network)
>>> optimizer = optax.adam(3e-3)
>>> state = jm.train(learner, training_tasks, optimizer, steps=20, meta_batch=2, key=jax.random.key(0))
>>> params = jm.calibrate(learner, state.params, training_tasks, jax.random.key(1), episodes=20)
>>> inductive = jm.prototypical(network, norm="population")
>>> test_tasks = make_tasks(split="test", ways=5, shots=1, queries=5)
>>> accuracy = jm.evaluate(inductive, params, test_tasks, episodes=100, key=jax.random.key(2))
>>> bool(accuracy.mean > 0.5)  # chance is 0.2
True

A class is added without the old examples, and the other classes stay as they are:

>>> task = test_tasks.sample(jax.random.key(3))
>>> adapted = inductive.adapt(params, task.support, jax.random.key(4))
>>> another = make_tasks(split="test", ways=1, shots=3).sample(jax.random.key(5)).support.x
>>> adapted = jm.add_class(network, params, adapted, another)
>>> inductive.predict(params, adapted, task.query.x).shape
(25, 6)

**Zero-shot.** With `metadata=` prototypes come from one vector for each class in place of images;
`jaxmeta.tasks` lists the tasks with such vectors. `jaxmeta train --preset glyphs-zero-shot` trains on
strokes.

**Transduction.** `soft_kmeans` and `label_propagation` also learn from the queries: their prediction for a
query depends on the other queries of the same call, under every `norm`. Their reports have the row
"transductive" alone, and the command `predict` refuses them.

**Baselines.** `simple_shot` and `fine_tuned_head` train an ordinary classifier of all training classes at
once (`jm.tasks.supervised(tasks)` makes its mini-batches of any few-shot tasks) and put a simple head on its
features.
"""  # noqa: E501

from jaxmeta.metric_based.kernel import Similarity, kernel_classifier
from jaxmeta.metric_based.label_propagation import label_propagation
from jaxmeta.metric_based.mahalanobis import mahalanobis
from jaxmeta.metric_based.matching import matching
from jaxmeta.metric_based.pretrained import fine_tuned_head, simple_shot
from jaxmeta.metric_based.prototypical import add_class, prototypical
from jaxmeta.metric_based.relation import relation
from jaxmeta.metric_based.ridge import ridge
from jaxmeta.metric_based.siamese import siamese
from jaxmeta.metric_based.soft_kmeans import soft_kmeans

__all__ = [
    "Similarity",
    "add_class",
    "fine_tuned_head",
    "kernel_classifier",
    "label_propagation",
    "mahalanobis",
    "matching",
    "prototypical",
    "relation",
    "ridge",
    "siamese",
    "simple_shot",
    "soft_kmeans",
]
