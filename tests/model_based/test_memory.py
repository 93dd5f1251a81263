"""External memories against plain loops over the published formulas, and the controller against torch's."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmeta as jm
from jaxmeta.nn.memory import address, content_weights, erase_and_add, least_used

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


def of_float64(params, scale=1.0):
    return jax.tree.map(lambda leaf: scale * leaf.astype(jnp.float64), params)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def softplus(a):
    return np.log1p(np.exp(a))


def used_state(memory, seed=0):
    """Return a state of an LRUA in the middle of an episode, without ties in its usage."""
    rng = np.random.default_rng(seed)
    read = rng.dirichlet(np.ones(memory.rows), size=memory.heads)
    return {
        "memory": jnp.asarray(rng.normal(size=(memory.rows, memory.width))),
        "usage": jnp.asarray(rng.uniform(size=memory.rows)),
        "read_weights": jnp.asarray(read),
        "reads": jnp.asarray(rng.normal(size=memory.heads * memory.width)),
    }


# Least recently used access.


def test_one_step_matches_values_computed_by_hand():
    state = {
        "memory": jnp.array([[1.0, 0], [0, 1], [1, 1], [0.5, -0.5]]),
        "usage": jnp.array([0.9, 0.2, 0.5, 0.1]),
        "read_weights": jnp.array([[0.0, 0, 1, 0]]),
        "reads": jnp.zeros(2),
    }
    memory = jm.nn.LRUA(rows=4, width=2, heads=1, decay=0.95)
    key = jnp.array([[1.0, 0]])
    after = memory.access(state, key, jnp.array([0.5]), key)
    np.testing.assert_allclose(after["memory"], [[1, 0], [0, 1], [1.5, 1], [0.5, 0]], atol=1e-12)
    close = partial(np.testing.assert_allclose, atol=5.1e-7)
    close(after["read_weights"], [[0.311209, 0.114487, 0.263095, 0.311209]])
    close(after["reads"], [0.861456, 0.377582])
    close(after["usage"], [1.166209, 0.304487, 1.238095, 0.906209])
    # w^w is usage minus decayed usage minus read weights, and the cosines are logarithms of the weights.
    written = after["usage"] - 0.95 * state["usage"] - after["read_weights"][0]
    np.testing.assert_allclose(written, [0, 0, 0.5, 0.5], atol=1e-12)
    logs = np.log(after["read_weights"][0])
    close(logs - logs[1], [1, 0, 0.832050, 1], atol=1e-6)


@pytest.mark.parametrize("least", ["shared", "per_head"])
@pytest.mark.parametrize("heads", [1, 3])
def test_mass_of_usage_is_conserved(heads, least):
    memory = jm.nn.LRUA(rows=6, width=2, heads=heads, decay=0.9, least=least)
    access = jax.jit(memory.access)
    state, rng = memory.initial(), np.random.default_rng(0)
    marked = heads if least == "shared" else 1
    for _ in range(8):
        keys, additions = (jnp.asarray(rng.normal(size=(heads, 2))) for _ in range(2))
        gates = rng.uniform(size=heads)
        after = access(state, keys, jnp.asarray(gates), additions)
        written = (gates + (1 - gates) * marked).sum()
        np.testing.assert_allclose(after["read_weights"].sum(1), 1, rtol=1e-12)
        np.testing.assert_allclose(
            after["usage"].sum(), 0.9 * state["usage"].sum() + heads + written, rtol=1e-12
        )
        state = after


@pytest.mark.parametrize(("decay", "limit"), [(0.95, 40), (0.99, 200)])
def test_usage_of_one_head_tends_to_a_limit(decay, limit):
    memory = jm.nn.LRUA(rows=5, width=2, heads=1, decay=decay)

    def step(state, drawn):
        key, gate = drawn
        return memory.access(state, key[None], gate[None], key[None]), None

    rng = np.random.default_rng(0)
    drawn = jnp.asarray(rng.normal(size=(3000, 2))), jnp.asarray(rng.uniform(size=3000))
    state, _ = jax.jit(lambda drawn: lax.scan(step, memory.initial(), drawn))(drawn)
    np.testing.assert_allclose(state["usage"].sum(), limit, rtol=1e-8)


@pytest.mark.nightly
def test_weights_without_strengths_are_bounded():
    e, rng = np.e, np.random.default_rng(0)
    for rows in (4, 128):
        low, high = 1 / e / (1 / e + (rows - 1) * e), e / (e + (rows - 1) / e)
        key = rng.normal(size=3)
        memory = -np.outer(rng.uniform(1, 2, size=rows), key)
        memory[2] = 0.5 * key
        weights = content_weights(jnp.asarray(memory), jnp.asarray([key, -key]))
        np.testing.assert_allclose(weights[0, 2], high, rtol=1e-9)
        np.testing.assert_allclose(weights[1, 2], low, rtol=1e-9)
        near = content_weights(
            jnp.asarray(memory + rng.normal(size=memory.shape)), jnp.asarray(rng.normal(size=(50, 3)))
        )
        assert (near > low).all()
        assert (near < high).all()
    assert f"{high:.6f}" == f"{weights[0, 2]:.6f}" == "0.054983"


@pytest.mark.parametrize("least", ["shared", "per_head"])
def test_gates_choose_between_last_read_and_least_used(least):
    memory = jm.nn.LRUA(rows=5, width=2, heads=2, least=least, write="separate")
    state = used_state(memory)
    h = jnp.asarray(np.random.default_rng(1).normal(size=3))
    params = of_float64(memory.init(KEY, state, h))
    first, second = np.argsort(state["usage"])[:2]
    marks = np.zeros((2, 5))
    if least == "shared":
        marks[:, [first, second]] = 1
    else:
        marks[0, first] = marks[1, second] = 1
    for bias, expected in ((60.0, np.asarray(state["read_weights"])), (-60.0, marks)):
        gates = {"kernel": 0 * params["params"]["gates"]["kernel"], "bias": jnp.full(2, bias)}
        variables = {"params": {**params["params"], "gates": gates}}
        after, _ = memory.apply(variables, state, h)
        written = after["usage"] - memory.decay * state["usage"] - after["read_weights"].sum(0)
        np.testing.assert_allclose(written, expected.sum(0), atol=1e-12)
        # Rows without weight are unchanged, except the wiped one; the others only have additions.
        before = np.array(state["memory"])
        before[first] = 0
        untouched = expected.sum(0) == 0
        np.testing.assert_array_equal(np.asarray(after["memory"])[untouched], before[untouched])
        layer = params["params"]["additions"]
        additions = np.tanh(np.asarray(h) @ layer["kernel"] + layer["bias"]).reshape(2, 2)
        np.testing.assert_allclose(after["memory"] - before, expected.T @ additions, atol=1e-12)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ([0.0] * 5, [0, 1, 2]),
        ([1.0, 0, 0, 0, 0], [1, 2, 3]),
        ([2.0, 1, 3, 1, 0], [4, 1, 3]),
        ([0.5, 0.5, 0.25, 0.5, 0.25], [2, 4, 0]),
    ],
)
def test_ties_in_usage_are_broken_by_the_first_row(usage, expected):
    actual = least_used(jnp.array(usage), 3)
    np.testing.assert_array_equal(actual, np.eye(5)[expected])
    assert least_used(jnp.array(usage), 1).argmax() == expected[0]
    assert least_used(jnp.array(usage), 5).sum(0).tolist() == [1.0] * 5


def test_least_used_weights_have_no_gradient():
    memory = jm.nn.LRUA(rows=5, width=2, heads=2)
    state, rng = used_state(memory), np.random.default_rng(2)
    probe = jnp.asarray(rng.normal(size=(2, 5)))
    gradient = jax.grad(lambda usage: (probe * least_used(usage, 2)).sum())(state["usage"])
    np.testing.assert_array_equal(gradient, 0)
    keys, gates = jnp.asarray(rng.normal(size=(2, 2))), jnp.array([0.3, 0.6])

    def read(usage, gates):
        return jnp.square(memory.access({**state, "usage": usage}, keys, gates, keys)["reads"]).sum()

    by_usage, by_gates = jax.jit(jax.grad(read, (0, 1)))(state["usage"], gates)
    np.testing.assert_array_equal(by_usage, 0)
    assert (by_gates != 0).all()


def plain_lrua(params, state, h, *, heads, decay, write, least, score, key_strength):
    """Take one step of the cell, element by element."""
    memory, usage, previous = (np.array(state[name]) for name in ("memory", "usage", "read_weights"))
    rows, width = memory.shape

    def linear(name, size, j):
        kernel, bias = np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])
        return [
            sum(h[k] * kernel[k, j * size + i] for k in range(len(h))) + bias[j * size + i]
            for i in range(size)
        ]

    keys = [np.tanh(linear("keys", width, j)) for j in range(heads)]
    gates = [sigmoid(linear("gates", 1, j)[0]) for j in range(heads)]
    adds = keys if write == "key" else [np.tanh(linear("additions", width, j)) for j in range(heads)]
    strengths = [1 + softplus(linear("strengths", 1, j)[0]) if key_strength else 1.0 for j in range(heads)]

    ranked = sorted(range(rows), key=lambda i: (usage[i], i))
    after = memory.copy()
    after[ranked[0]] = 0
    written = np.zeros((heads, rows))
    for j in range(heads):
        for i in range(rows):
            marked = i in ranked[:heads] if least == "shared" else i == ranked[j]
            written[j, i] = gates[j] * previous[j, i] + (1 - gates[j]) * marked
            after[i] += written[j, i] * adds[j]

    scored = after if score == "after" else memory
    read, reads = np.zeros((heads, rows)), []
    for j in range(heads):
        for i in range(rows):
            norms = np.sqrt((keys[j] ** 2).sum() + 1e-12) * np.sqrt((scored[i] ** 2).sum() + 1e-12)
            read[j, i] = np.exp(strengths[j] * (keys[j] * scored[i]).sum() / norms)
        read[j] /= read[j].sum()
        reads.append(sum(read[j, i] * after[i] for i in range(rows)))
    usage = decay * usage + read.sum(0) + written.sum(0)
    return {"memory": after, "usage": usage, "read_weights": read, "reads": np.concatenate(reads)}


@pytest.mark.nightly_rows(after=3)
@pytest.mark.parametrize(
    ("write", "least", "score", "key_strength"),
    [*itertools.product(("key", "separate"), ("shared", "per_head"), ("after", "before"), (False, True))],
)
def test_the_cell_matches_a_plain_loop(write, least, score, key_strength):
    options = {"write": write, "least": least, "score": score, "key_strength": key_strength}
    # Few steps on many rows, because equally written rows would tie up to rounding.
    memory = jm.nn.LRUA(rows=9, width=3, heads=2, decay=0.8, **options)
    uniform = memory.clone(first_read="uniform").initial()
    np.testing.assert_allclose(uniform["read_weights"], 1 / 9, rtol=1e-6)
    np.testing.assert_array_equal(memory.initial()["read_weights"], np.eye(9)[[0, 0]])
    starts = [memory.initial(), uniform, used_state(memory), used_state(memory, 1)]
    h = np.random.default_rng(3).normal(size=(4, 5))
    params = of_float64(memory.init(KEY, starts[0], jnp.asarray(h[0])), 2)

    def run(start):
        def step(state, now):
            after, reads = memory.apply(params, state, now)
            return after, (after, reads)

        return lax.scan(step, start, jnp.asarray(h))[1]

    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    actual, reads = jax.device_get(jax.jit(jax.vmap(run))(batch))
    for b, state in enumerate(starts):
        for t in range(len(h)):
            state = plain_lrua(params["params"], state, h[t], heads=2, decay=0.8, **options)
            for name, expected in state.items():
                np.testing.assert_allclose(actual[name][b, t], expected, atol=1e-10, err_msg=name)
            np.testing.assert_array_equal(reads[b, t], actual["reads"][b, t])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 3, "heads": 4}, "rows: got 3"),
        ({"write": "both"}, "write: got 'both'"),
        ({"least": "all"}, "least: got 'all'"),
        ({"score": "never"}, "score: got 'never'"),
        ({"first_read": "last_row"}, "first_read: got 'last_row'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.nn.LRUA(**settings)


def test_as_many_rows_as_heads_are_accepted():
    memory = jm.nn.LRUA(rows=2, width=3, heads=2)
    keys = jnp.ones((2, 3))
    after = memory.access(memory.initial(), keys, jnp.array([0.0, 0.0]), keys)
    np.testing.assert_allclose(after["memory"], 2, atol=1e-12)


# Addressing of the Neural Turing Machine.


def random_addressing(rng, heads, rows, width, shift):
    return {
        "memory": rng.normal(size=(rows, width)),
        "previous": rng.dirichlet(np.ones(rows), size=heads),
        "keys": rng.normal(size=(heads, width)),
        "strengths": rng.uniform(0.1, 5, size=heads),
        "gates": rng.uniform(size=heads),
        "shifts": rng.dirichlet(np.ones(2 * shift + 1), size=heads),
        "sharpening": rng.uniform(1, 4, size=heads),
    }


def plain_address(memory, previous, keys, strengths, gates, shifts, sharpening):
    """Compute equations 5 to 9 of Graves et al. 2014, head by head."""
    heads, rows = previous.shape
    reach = shifts.shape[1] // 2
    actual = np.zeros((heads, rows))
    for h in range(heads):
        content = np.zeros(rows)
        for i in range(rows):
            norms = np.linalg.norm(keys[h]) * np.linalg.norm(memory[i])
            content[i] = np.exp(strengths[h] * (keys[h] * memory[i]).sum() / norms)
        content /= content.sum()
        gated = gates[h] * content + (1 - gates[h]) * previous[h]
        shifted = np.zeros(rows)
        for i in range(rows):
            for j in range(rows):
                for s in range(-reach, reach + 1):
                    if (i - j) % rows == s % rows:
                        shifted[i] += gated[j] * shifts[h, s + reach]
        actual[h] = shifted ** sharpening[h] / (shifted ** sharpening[h]).sum()
    return actual


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_addresses_match_plain_loops(shift):
    arguments = random_addressing(np.random.default_rng(shift), heads=3, rows=6, width=4, shift=shift)
    actual = address(**{name: jnp.asarray(value) for name, value in arguments.items()})
    np.testing.assert_allclose(actual, plain_address(**arguments), atol=1e-9)
    np.testing.assert_allclose(actual.sum(1), 1, rtol=1e-12)


def test_a_shift_by_one_moves_weights_to_the_next_row_cyclically():
    arguments = random_addressing(np.random.default_rng(0), heads=2, rows=5, width=3, shift=1)
    arguments |= {"gates": np.zeros(2), "shifts": np.eye(3)[[2, 2]], "sharpening": np.ones(2)}
    arguments["previous"] = np.eye(5)[[1, 4]]
    actual = address(**{name: jnp.asarray(value) for name, value in arguments.items()})
    np.testing.assert_allclose(actual, np.eye(5)[[2, 0]], atol=1e-9)


def test_gradients_are_finite_at_weights_of_zero():
    arguments = random_addressing(np.random.default_rng(0), heads=2, rows=5, width=3, shift=1)
    arguments |= {"gates": np.zeros(2), "shifts": np.eye(3)[[1, 2]], "previous": np.eye(5)[[1, 4]]}
    arguments = {name: jnp.asarray(value) for name, value in arguments.items()}
    gradients = jax.jit(jax.grad(lambda arguments: jnp.square(address(**arguments)).sum()))(arguments)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name


def test_all_heads_erase_before_any_adds():
    rng = np.random.default_rng(0)
    memory, weights = rng.normal(size=(5, 3)), rng.dirichlet(np.ones(5), size=2)
    erasures, additions = rng.uniform(size=(2, 3)), rng.normal(size=(2, 3))
    expected = memory.copy()
    for i, j, m in itertools.product(range(5), range(2), range(3)):
        expected[i, m] *= 1 - weights[j, i] * erasures[j, m]
    for i, j, m in itertools.product(range(5), range(2), range(3)):
        expected[i, m] += weights[j, i] * additions[j, m]
    actual = erase_and_add(*map(jnp.asarray, (memory, weights, erasures, additions)))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_heads_of_the_turing_machine_distribute_and_read_what_was_written():
    memory = jm.nn.NTM(rows=6, width=3, heads=2, shift=1)
    start = memory.initial()
    h = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    params = of_float64(memory.init(KEY, start, h[0]), 3)

    def step(state, now):
        after, reads = memory.apply(params, state, now)
        return after, (after, reads)

    states, reads = jax.device_get(jax.jit(lambda start: lax.scan(step, start, h))(start)[1])
    for kind in ("read_weights", "write_weights"):
        assert states[kind].shape == (4, 2, 6)
        assert (states[kind] >= 0).all()
        np.testing.assert_allclose(states[kind].sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(
        reads, np.einsum("thr,trw->thw", states["read_weights"], states["memory"]).reshape(4, -1), rtol=1e-12
    )
    np.testing.assert_array_equal(reads, states["reads"])
    assert np.abs(states["memory"][0]).max() > 0.01


# The controller.


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("memory", [None, jm.nn.LRUA(rows=4, width=2, heads=1)], ids=["none", "LRUA"])
def test_the_controller_matches_a_torch_lstm_with_an_open_forget_gate(memory):
    torch = pytest.importorskip("torch")
    network = jm.nn.MemoryNetwork(out=3, memory=memory, hidden=4)
    params = of_float64(network.init(KEY, jnp.zeros(5)), 1.5)
    rng = np.random.default_rng(0)
    params["params"]["inputs"]["bias"] = jnp.asarray(rng.normal(size=16))
    own = jax.tree.map(np.asarray, params["params"])
    reads = 0 if memory is None else 2
    cell = torch.nn.LSTMCell(5 + reads, 4, dtype=torch.float64)
    # Recurrent input: first the controller's output, then the reads.
    back = own["recurrent"]["kernel"]
    kernels = [own["inputs"]["kernel"], back[4:]]
    bias = own["inputs"]["bias"].copy()
    bias[4:8] += 1
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor(np.concatenate(kernels).T))
        cell.weight_hh.copy_(torch.tensor(back[:4].T))
        cell.bias_ih.copy_(torch.tensor(bias))
        cell.bias_hh.zero_()
    x = rng.normal(size=(4, 5))
    projected = network.apply(params, jnp.asarray(x), method="project")
    step = jax.jit(partial(network.apply, method="step"))
    state = network.initial()
    h, c = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    for t in range(4):
        inputs = np.concatenate([x[t], state["memory"]["reads"] if reads else []])
        state, features = step(params, state, projected[t])
        with torch.no_grad():
            h, c = cell(torch.tensor(inputs)[None], (h, c))
        np.testing.assert_allclose(state["h"], h[0], rtol=1e-10)
        np.testing.assert_allclose(state["c"], c[0], rtol=1e-10)
        # The output layer receives the controller's output and the new reads.
        features_and_reads = np.concatenate([h[0], state["memory"]["reads"] if reads else []])
        outputs = network.apply(params, features, method="outputs")
        np.testing.assert_allclose(
            outputs, features_and_reads @ own["head"]["kernel"] + own["head"]["bias"], rtol=1e-9
        )


def test_a_feed_forward_controller_keeps_state_only_in_its_memory():
    network = jm.nn.MemoryNetwork(
        out=3, memory=jm.nn.LRUA(rows=4, width=2, heads=1), hidden=4, controller="feed_forward"
    )
    params = of_float64(network.init(KEY, jnp.zeros(5)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)))

    def outputs(first):
        state = network.initial()
        assert set(state) == {"memory"}
        state, _ = network.apply(params, state, network.apply(params, first, method="project"), method="step")
        wiped = {**state, "memory": network.memory.initial()}
        projected = network.apply(params, x[1], method="project")
        return [
            network.apply(params, network.apply(params, s, projected, method="step")[1], method="outputs")
            for s in (state, wiped)
        ]

    (one, forgotten), (other, forgotten_too) = outputs(x[0]), outputs(-x[0])
    assert np.abs(one - other).max() > 1e-4
    np.testing.assert_array_equal(forgotten, forgotten_too)


def test_an_unknown_controller_is_refused():
    with pytest.raises(ValueError, match="controller: got 'gru'"):
        jm.nn.MemoryNetwork(out=3, controller="gru")


MEMORIES = {
    "default": jm.nn.LRUA(rows=8, width=3, heads=2),
    "options": jm.nn.LRUA(
        rows=8, width=3, heads=2, write="separate", least="per_head", score="before", key_strength=True
    ),
    "uniform": jm.nn.LRUA(rows=8, width=3, heads=2, first_read="uniform"),
    "NTM": jm.nn.NTM(rows=8, width=3, heads=2),
}


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("name", MEMORIES)
def test_gradients_from_the_first_step_are_finite_and_correct(name):
    network = jm.nn.MemoryNetwork(out=3, memory=MEMORIES[name], hidden=4)
    params = of_float64(network.init(KEY, jnp.zeros(5)), 2)
    rng = np.random.default_rng(0)
    x, probe = jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=(3, 3)))

    @jax.jit
    def loss(params):
        start = network.initial()
        step = partial(network.apply, params, method="step")
        features = lax.scan(step, start, network.apply(params, x, method="project"))[1]
        return (probe * network.apply(params, features, method="outputs")).sum()

    grads = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert (leaf != 0).any(), path
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

    def at(size):
        return loss(jax.tree.map(lambda leaf, way: leaf + size * way, params, direction))

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, way: (g * way).sum(), grads, direction)))
    assert abs(slope) > 0.01
    np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, slope, rtol=1e-6)
