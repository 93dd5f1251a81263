"""Few-shot learning, meta-learning and transfer learning in JAX.

A source of tasks is one pure function, and a learner is four:

    tasks.sample(key)                     -> Task(support, query)
    learner.init(key, task)               -> params
    learner.adapt(params, support, key)   -> adapted
    learner.predict(params, adapted, x)   -> outputs
    learner.loss(params, task, key, step) -> (scalar, metrics)

| what | names |
| --- | --- |
| tasks | `jaxmeta.tasks`: drawn, published data sets, your own images, arrays and tables |
| networks | `jaxmeta.nn`: convolutional, residual and transformer networks, and adapters for Flax Linen, \
  Flax NNX, Equinox and plain functions |
| optimization-based learners | `maml`, `fomaml`, `anil`, `boil`, `meta_sgd`, `reptile`, `imaml`, \
  `maml_plus_plus`, `cavia`, `lstm_meta_learner`, `learned_optimizer` |
| metric-based learners | `prototypical`, `matching`, `relation`, `siamese`, `kernel_classifier`, `ridge`, \
  `mahalanobis`, `soft_kmeans`, `label_propagation`, and the baselines `simple_shot` and `fine_tuned_head` |
| model-based learners | `mann`, `metanet` |
| a learner of your own | `Learner`, `inner_loop`, `learner`, `forwards`, `check_learner` |
| training | `train`, `progress_bar`, `meta_step`, `make_mesh`, `save`, `load`; more in `jaxmeta.training` |
| evaluation | `evaluate`, `evaluate_classes`, `evaluate_metrics`, `run_episodes`, `calibrate`, \
  `meta_gradient_alignment` |
| trained learners | `load_run`, `load_classifier`, `export` |
| pretrained features | `features`, for any metric-based learner; `jaxmeta.tasks.embedded` |
| transfer | `jaxmeta.transfer`: pretrained weights, fine-tuning, domain adaptation, label shift, scores |

In signatures `Array` is a JAX array, `Float[Array, "n d"]` one of floats with the axes n and d, `Key` is a
key of `jax.random`, and `PyTree`, `Params` and `Adapted` are nested containers of arrays.

```python
import jax, optax
import jaxmeta as jm

tasks = jm.tasks.glyphs("train", ways=5, shots=1, queries=3)
learner = jm.maml(jm.nn.StridedConv4(ways=5))
state = jm.train(learner, tasks, optax.adam(1e-3), steps=1000, meta_batch=8, key=jax.random.key(0))

unseen = jm.tasks.glyphs("test", ways=5, shots=1, queries=5)
print(jm.evaluate(learner, state.params, unseen, key=jax.random.key(1)))

task = unseen.sample(jax.random.key(2))
adapted = learner.adapt(state.params, task.support, jax.random.key(3))
classes = learner.predict(state.params, adapted, task.query.x).argmax(-1)
```
"""

from typing import TYPE_CHECKING, Any

from jaxmeta import losses, nn, tasks, training, transfer
from jaxmeta.checks import ArgumentError
from jaxmeta.core import (
    Batch,
    Learner,
    Model,
    ProtocolCard,
    Task,
    TaskDistribution,
    TaskStream,
    episode_keys,
)
from jaxmeta.declare import forwards, learner
from jaxmeta.metric_based import (
    Similarity,
    add_class,
    fine_tuned_head,
    kernel_classifier,
    label_propagation,
    mahalanobis,
    matching,
    prototypical,
    relation,
    ridge,
    siamese,
    simple_shot,
    soft_kmeans,
)
from jaxmeta.model_based import mann, metanet
from jaxmeta.optimization_based import (
    anil,
    boil,
    cavia,
    evolution_gradient,
    fomaml,
    imaml,
    inner_loop,
    learned_optimizer,
    learned_optimizer_as_optax,
    learned_optimizer_unroll,
    lstm_meta_learner,
    maml,
    maml_plus_plus,
    meta_sgd,
    persistent_evolution,
    reptile,
)
from jaxmeta.training import (
    Alignment,
    ClassEvaluation,
    Episodes,
    Evaluation,
    TrainState,
    calibrate,
    check_learner,
    evaluate,
    evaluate_classes,
    evaluate_episodes,
    evaluate_metrics,
    export,
    init_state,
    load,
    load_params,
    make_mesh,
    meta_gradient_alignment,
    meta_step,
    progress_bar,
    run_episodes,
    save,
    train,
)

if TYPE_CHECKING:
    from jaxmeta.cli.classifier import load_classifier
    from jaxmeta.cli.features import features
    from jaxmeta.cli.run import load_run

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "ArgumentError",
    "Batch",
    "ClassEvaluation",
    "Episodes",
    "Evaluation",
    "Learner",
    "Model",
    "ProtocolCard",
    "Similarity",
    "Task",
    "TaskDistribution",
    "TaskStream",
    "TrainState",
    "add_class",
    "anil",
    "boil",
    "calibrate",
    "cavia",
    "check_learner",
    "episode_keys",
    "evaluate",
    "evaluate_classes",
    "evaluate_episodes",
    "evaluate_metrics",
    "evolution_gradient",
    "export",
    "features",
    "fine_tuned_head",
    "fomaml",
    "forwards",
    "imaml",
    "init_state",
    "inner_loop",
    "kernel_classifier",
    "label_propagation",
    "learned_optimizer",
    "learned_optimizer_as_optax",
    "learned_optimizer_unroll",
    "learner",
    "load",
    "load_classifier",
    "load_params",
    "load_run",
    "losses",
    "lstm_meta_learner",
    "mahalanobis",
    "make_mesh",
    "maml",
    "maml_plus_plus",
    "mann",
    "matching",
    "meta_gradient_alignment",
    "meta_sgd",
    "meta_step",
    "metanet",
    "nn",
    "persistent_evolution",
    "progress_bar",
    "prototypical",
    "relation",
    "reptile",
    "ridge",
    "run_episodes",
    "save",
    "siamese",
    "simple_shot",
    "soft_kmeans",
    "tasks",
    "train",
    "training",
    "transfer",
]


def __getattr__(name: str) -> Any:
    """Import functions of `jaxmeta.cli` on first access, which keeps `import jaxmeta` fast."""
    if name == "load_run":
        from jaxmeta.cli.run import load_run

        return load_run
    if name == "load_classifier":
        from jaxmeta.cli.classifier import load_classifier

        return load_classifier
    if name == "features":
        from jaxmeta.cli.features import features

        return features
    raise AttributeError(f"module 'jaxmeta' has no attribute {name!r}")
