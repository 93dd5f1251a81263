"""Rows and peers of benchmarks/throughput.py."""

import dataclasses
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
from rows import LSTMRow


def test_the_lstm_runs_on_every_parameter_in_every_step():
    row = LSTMRow()
    task = jax.tree.map(lambda leaf: leaf[0], row.tasks(1, seed=0))
    params = jax.eval_shape(row.learner("second").init, jax.random.key(0), task)
    with_lstm, without = (
        dataclasses.replace(row, hidden=hidden).operations("second") for hidden in (row.hidden, 0)
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params["model"]))
    per_parameter = 4 * row.hidden * (2 * 4 + 3 * row.hidden) + 2 * 3 * row.hidden
    assert with_lstm - without == 2 * row.meta_batch * row.inner_steps * parameters * per_parameter
