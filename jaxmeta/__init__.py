"""Learning from few examples, in JAX.

import jaxmeta as jm

tasks = jm.tasks.glyphs(ways=5, shots=1, queries=3)              # sample(key) -> Task(support, query)
learner = jm.maml(jm.nn.StridedConv4(ways=5))                    # init, adapt, predict, loss
state = jm.train(learner, tasks, optax.adam(1e-3), steps=1000, key=jax.random.key(0))
jm.evaluate(learner, state.params, test_tasks, key=jax.random.key(1))
"""

from jaxmeta import losses, nn, tasks, transfer
from jaxmeta.config import load_run
from jaxmeta.core import Batch, Learner, Model, ProtocolCard, Task, TaskDistribution, TaskStream
from jaxmeta.metric_based import (
    Similarity,
    add_class,
    fine_tuned_head,
    kernel_classifier,
    matching,
    prototypical,
    relation,
    ridge,
    siamese,
    simple_shot,
)
from jaxmeta.model_based import mann, metanet
from jaxmeta.optimization_based import (
    LearnedOptimizer,
    anil,
    boil,
    fomaml,
    imaml,
    inner_loop,
    learned_optimizer,
    lstm_meta_learner,
    maml,
    maml_plus_plus,
    meta_sgd,
    reptile,
)
from jaxmeta.training import (
    Alignment,
    Evaluation,
    TrainState,
    calibrate,
    evaluate,
    evaluate_episodes,
    evaluate_metrics,
    init_state,
    load,
    load_params,
    make_mesh,
    meta_gradient_alignment,
    meta_step,
    save,
    train,
)

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Batch",
    "Evaluation",
    "LearnedOptimizer",
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
    "evaluate",
    "evaluate_episodes",
    "evaluate_metrics",
    "fine_tuned_head",
    "fomaml",
    "imaml",
    "init_state",
    "inner_loop",
    "kernel_classifier",
    "learned_optimizer",
    "load",
    "load_params",
    "load_run",
    "losses",
    "lstm_meta_learner",
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
    "prototypical",
    "relation",
    "reptile",
    "ridge",
    "save",
    "siamese",
    "simple_shot",
    "tasks",
    "train",
    "transfer",
]
