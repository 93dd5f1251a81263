"""Model-based methods: networks that learn a task through a memory or fast weights.

| learner | how a task is learned |
| --- | --- |
| `mann` | a recurrent network writes the examples to a memory, and classifies the next example from what it reads (Santoro et al. 2016) |
| `metanet` | gradients of the support set become fast weights, which queries read by attention (Munkhdalai & Yu 2017) |

**Sequences.** A memory-augmented network sees one example after another, each with the label of the one
before, and must classify it. `jm.tasks.sequences` makes such sequences of any few-shot tasks:

>>> import jax
>>> import numpy as np
>>> import optax
>>> import jaxmeta as jm
>>> x, y = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32), np.arange(200) % 20
>>> tasks = jm.tasks.sequences(jm.tasks.from_arrays(x, y, ways=3, shots=3, queries=1))
>>> network = jm.nn.MemoryNetwork(out=3, memory=jm.nn.LRUA(rows=16, width=8, heads=2), hidden=16)
>>> learner = jm.mann(network)
>>> state = jm.train(
...     learner, tasks, optax.adam(1e-3), steps=2, key=jax.random.key(0), meta_batch=4, strategy="vmap"
... )
>>> by_presentation = jm.evaluate_metrics(learner, state.params, tasks, episodes=8, key=jax.random.key(1))
>>> {"instance_1", "instance_3"} <= {*by_presentation}
True

`instance_1` is the accuracy when a class is new, `instance_3` when it has been seen twice. Santoro's network
has `LRUA(rows=128, width=40, heads=4)`, `hidden=200` and sequences of 50 images.

`memory=jm.nn.NTM()` selects the addressing of the Neural Turing Machine, and `memory=None` an LSTM without a
memory. Labels can be strings (`strings=(5, 5)`), and `jm.tasks.with_ways(tasks, n)` allows a curriculum without
recompilation. Santoro's experiments are `jaxmeta train --preset mann-omniglot` and `jaxmeta train --preset
mann-omniglot-strings`; `benchmarks/README.md` compares the memories.
"""  # noqa: E501

from jaxmeta.model_based.mann import mann
from jaxmeta.model_based.metanet import metanet

__all__ = ["mann", "metanet"]
