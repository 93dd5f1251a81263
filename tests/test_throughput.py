"""Rows and peers of benchmarks/throughput.py."""

import dataclasses
import json
import pathlib
import sys
import time
import types

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import hlo
import jax_peers
import throughput
from rows import ROWS, ConvRow, LSTMRow, SequenceRow

POOLED = ConvRow(
    image=(10, 11, 2),
    filters=4,
    strided=False,
    features=4,
    queries=2,
    inner_steps=1,
    inner_lr=0.1,
    meta_batch=2,
    ways=3,
    blocks=2,
    padding="VALID",
)
SMALL = {
    "prototypical": dataclasses.replace(POOLED, inner_steps=0),
    "pooled": POOLED,
    "strided": dataclasses.replace(POOLED, image=(8, 8, 1), strided=True, blocks=4, padding="SAME"),
    "sequences": SequenceRow(
        image=(2, 2, 1), ways=3, length=4, hidden=5, rows=6, width=3, heads=2, meta_batch=2
    ),
}


def run(monkeypatch, row, peers, *options):
    """Return the result of a row with these peers, each timed for a moment."""
    monkeypatch.setitem(ROWS, "row", row)
    args = throughput.parse_arguments(["--repeats", "1", "--seconds", "0.001", *options])
    args.peer_names = peers
    # Peers are written as usual, with the default setting.
    with jax.numpy_rank_promotion("allow"):
        return throughput.run_row("row", args, "cpu", types.SimpleNamespace(run=lambda: 1e9))


@pytest.mark.parametrize(
    ("row", "peers"),
    [
        *(
            pytest.param(row, peers, marks=pytest.mark.nightly)
            for row, peers in (
                ("prototypical", ["plain JAX"]),
                ("pooled", ["torch.func", "torch.autograd", "higher", "plain JAX"]),
                ("strided", ["torch.func", "torch.autograd", "higher", "plain JAX"]),
            )
        ),
        # torch.compile takes most of a minute.
        *(
            pytest.param(row, peers, marks=pytest.mark.slow)
            for row, peers in (
                ("pooled", ["torch.compile, vmap"]),
                ("prototypical", ["torch.autograd", "torch.compile, loop"]),
                ("sequences", ["torch.autograd", "torch.compile"]),
            )
        ),
    ],
)
def test_peers_compute_our_gradient_in_float64(row, peers, monkeypatch, capsys):
    if peers != ["plain JAX"]:
        pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    result = run(monkeypatch, SMALL[row], peers)
    assert list(result["contenders"]) == ["jaxmeta", *peers]
    printed = capsys.readouterr().out.splitlines()
    for name, contender in result["contenders"].items():
        (line,) = (line for line in printed if line.startswith(f"  {name:19} "))
        assert f"{contender['first_step_s']:.1f} s" in line
        if name in peers:
            assert contender["gradient_error"] < 1e-10
            assert line.endswith(contender["form"])
    assert result["contenders"]["jaxmeta"]["memory_bytes"] > 0
    json.dumps(result)


@pytest.mark.nightly
def test_a_quick_run_has_the_fastest_eager_peer(monkeypatch):
    torch_peers = pytest.importorskip("torch_peers", reason="PyTorch is not installed")
    assert throughput.parse_arguments(["--quick"]).repeats < throughput.parse_arguments([]).repeats
    slow = torch_peers.PEERS["torch.autograd"]

    def delayed(*args):
        backward = slow(*args)
        return lambda tasks: (time.sleep(0.5), backward(tasks))

    monkeypatch.setitem(torch_peers.PEERS, "torch.autograd", delayed)
    result = run(monkeypatch, SMALL["pooled"], ["torch.autograd", "torch.func"], "--quick")
    assert list(result["contenders"]) == ["jaxmeta", "torch.func"]


def test_the_gradient_error_is_that_of_the_worst_array_without_biases_before_a_normalisation():
    ours = {"Conv_0/kernel": np.full((2, 2), 1e3), "Conv_0/bias": np.zeros(2), "Dense_0/bias": np.ones(4)}
    theirs = {
        "Conv_0/kernel": np.full((2, 2), 1e3),
        "Conv_0/bias": np.full(2, 1e-9),
        "Dense_0/bias": np.ones(4),
    }
    assert throughput.gradient_error(ours, theirs) == 0
    theirs["Dense_0/bias"] = np.array([1, 1, 1, 1.25])
    assert throughput.gradient_error(ours, theirs) == 0.125
    theirs["Conv_0/kernel"] = np.full((2, 2), np.nan)
    assert np.isnan(throughput.gradient_error(ours, theirs))


@pytest.mark.parametrize("row", ["pooled", "prototypical"])
def test_operations_of_a_row_are_those_of_its_compiled_gradient(row):
    # Without padding, whose zeros a row counts and the compiler does not.
    row = SMALL[row]
    task = jax.tree.map(lambda leaf: leaf[0], row.tasks(1, seed=0))
    x = task.support.x
    params = jax.eval_shape(jax_peers.Net(row).init, jax.random.key(0), x)["params"]
    gradient = jax.grad(jax_peers.task_loss(row, "second"))
    # Compilers for accelerators express products differently.
    with jax.default_device(jax.devices("cpu")[0]), jax.numpy_rank_promotion("allow"):
        lowered = jax.jit(gradient).lower(params, (x, task.support.y, task.query.x, task.query.y))
    program = hlo.read_program(lowered.compile().as_text())
    assert hlo.operations(program) * row.meta_batch == row.operations("second")


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
