"""Tests of `jm.export`: exported programs of adapted learners, which need only JAX."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm

KEY = jax.random.key(0)
# Packages that the process with the exported programs must not import.
BLOCKED = ("jaxmeta", "flax", "optax", "jaxtyping", "chex")
RUNNER = f"""
import pathlib, sys
for name in {BLOCKED}:
    sys.modules[name] = None  # importing it raises
import jax, numpy as np
folder = pathlib.Path(sys.argv[1])
for path in sorted(folder.glob("*.stablehlo")):
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    x = np.load(path.with_suffix(".npy"))
    for count in (1, 7):
        np.save(path.with_suffix(f".{{count}}.npy"), program.call(x[:count]))
"""


def images(ways=3, count=9):
    rng = np.random.default_rng(0)
    y = np.arange(count, dtype=np.int32) % ways
    x = rng.normal(size=(count, 6, 6, 1)).astype(np.float32) + y.reshape(-1, 1, 1, 1)
    return jm.Batch(jnp.asarray(x), jnp.asarray(y), ways=ways)


def waves(count=9):
    x = np.random.default_rng(0).uniform(-2, 2, (count, 1)).astype(np.float32)
    return jm.Batch(jnp.asarray(x), jnp.sin(x))


def nearest_mean():
    """Return a user-defined learner, as in README, without `mask` and `step`."""

    def init(key, task):
        return {"scale": jnp.ones((1, *task.support.x.shape[1:]))}

    def adapt(params, support, key):
        slots = jax.nn.one_hot(support.y, support.ways)
        return (
            jnp.einsum("nw,n...->w...", slots, support.x * params["scale"])
            / slots.sum(0)[:, None, None, None]
        )

    def predict(params, adapted, x):
        return -jnp.square((x * params["scale"])[:, None] - adapted[None]).sum((2, 3, 4))

    return jm.Learner(init, adapt, predict, None)


def adapted_learner(learner, batch):
    """Return a learner, its initial parameters, and the result of adaptation to a batch."""

    def run(batch):
        params = learner.init(KEY, jm.Task(batch, batch))
        return params, learner.adapt(params, batch, KEY)

    return learner, *jax.jit(run)(batch)


def mlp(out, norm=False):
    return jm.nn.MLP(out=out, hidden=(5,), norm=norm, kernel_init=jax.nn.initializers.lecun_normal())


CASES = {
    "nearest_mean": (nearest_mean, images),
    "regression": (lambda: jm.maml(mlp(1), inner_lr=0.01, loss=jm.losses.mse), waves),
    "support": (lambda: jm.maml(mlp(3, norm=True), inner_lr=0.1, norm="support"), images),
    "prototypical": (lambda: jm.prototypical(mlp(4)), images),
}


@pytest.mark.parametrize(
    "names",
    [("nearest_mean",), pytest.param(("regression", "support", "prototypical"), marks=pytest.mark.nightly)],
)
def test_programs_run_without_jaxmeta_and_match_predict(names, tmp_path):
    folder, expected = tmp_path / "new folder", {}
    for name in names:
        make, examples = CASES[name]
        learner, params, adapted = adapted_learner(make(), examples())
        x = examples().x
        jm.export(folder / f"{name}.stablehlo", learner, params, adapted, x[:2])
        np.save(folder / f"{name}.npy", x)
        for count in (1, 7):
            expected[f"{name}.{count}.npy"] = jax.jit(learner.predict)(params, adapted, x[:count])
    # No partial file is left.
    assert len(list(folder.iterdir())) == 2 * len(names)
    done = subprocess.run([sys.executable, "-c", RUNNER, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, outputs in expected.items():
        assert np.abs(outputs).max() > 0.01
        np.testing.assert_allclose(np.load(folder / name), outputs, rtol=1e-5, atol=1e-5)


def test_a_file_is_replaced_only_with_overwrite_true(tmp_path):
    learner, params, adapted = adapted_learner(nearest_mean(), images())
    path, x = tmp_path / "program.stablehlo", images().x
    jm.export(path, learner, params, adapted, x)
    with pytest.raises(FileExistsError, match=r"path: .* exists; pass overwrite=True"):
        jm.export(path, learner, params, adapted, x)
    with pytest.raises(FileExistsError, match="is a folder"):
        jm.export(tmp_path, learner, params, adapted, x, overwrite=True)
    jm.export(path, learner, params, 2 * adapted, x, overwrite=True)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    np.testing.assert_allclose(program.call(x), learner.predict(params, 2 * adapted, x), rtol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_export_accepts_numpy_arrays_and_shapes(tmp_path):
    learner, _, adapted = adapted_learner(nearest_mean(), images())
    learner = learner._replace(predict=lambda params, adapted, x: params["table"][(x > 0).sum((1, 2, 3))])
    table = np.random.default_rng(0).normal(size=(37, 3)).astype(np.float32)
    x = images().x
    path = tmp_path / "program.stablehlo"
    jm.export(path, learner, {"table": table}, adapted, jax.ShapeDtypeStruct((1, 6, 6, 1), np.float64))
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    np.testing.assert_array_equal(program.call(x), table[np.asarray(x > 0).sum((1, 2, 3))])
    assert set(program.platforms) == {"cpu", "cuda", "rocm", "tpu"}


def test_a_predict_for_a_fixed_number_of_examples_needs_batch(tmp_path):
    learner, params, adapted = adapted_learner(nearest_mean(), images())
    learner = learner._replace(predict=lambda params, adapted, x: jnp.stack([row.sum()[None] for row in x]))
    path, x = tmp_path / "program.stablehlo", images().x
    with pytest.raises(
        jm.ArgumentError, match=r"any number of examples .*; give a fixed number, such as batch=9"
    ):
        jm.export(path, learner, params, adapted, x)
    assert not path.exists()
    jm.export(path, learner, params, adapted, x, batch=4, platforms=("cpu",))
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    np.testing.assert_allclose(program.call(x[:4])[:, 0], x[:4].sum((1, 2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match="shape"):
        program.call(x[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": 1.0}, r"x: got shape \(\)"),
        ({"batch": 0}, "batch: got 0; it must be at least 1"),
        ({"platforms": ("abacus",)}, "platforms: got .*abacus.*; it must be one or more of cpu, cuda"),
        ({"platforms": ()}, "platforms: got"),
    ],
)
def test_invalid_arguments_are_refused_by_name(tmp_path, settings, message):
    learner, params, adapted = adapted_learner(nearest_mean(), images())
    arguments = {"learner": learner, "params": params, "adapted": adapted, "x": images().x, **settings}
    with pytest.raises(jm.ArgumentError, match=message):
        jm.export(tmp_path / "program.stablehlo", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_error_in_predict_is_not_replaced(tmp_path):
    learner, params, adapted = adapted_learner(nearest_mean(), images())
    with pytest.raises(TypeError, match="incompatible shapes"):
        jm.export(tmp_path / "program.stablehlo", learner, params, adapted, jnp.zeros((2, 5, 5, 1)))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    learner, params, adapted = adapted_learner(nearest_mean(), images())
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match="pip install flatbuffers"):
        jm.export(tmp_path / "program.stablehlo", learner, params, adapted, images().x)
