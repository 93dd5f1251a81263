"""Tests of checkpoint files: round trips, damage, other configurations, and a full disk."""

import os
import shutil
from collections import namedtuple
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxmeta.training import Evaluation, init_state, load, load_params, save
from jaxmeta.training.checkpoint import Best, checkpoint_steps, restore_checkpoint, save_checkpoint

Point = namedtuple("Point", "x y")


@cache
def new_state(width=8, optimizer=None, key=None):
    return init_state(
        toys.maml(width),
        optimizer or toys.adam(),
        toys.sinusoid(),
        (key or jax.random.key)(0),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def same(x, y):
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.dtype == y.dtype
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert getattr(x, "dtype", type(x)) == getattr(y, "dtype", type(y))
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, a, b)


def test_trees_of_dicts_lists_and_tuples_load_without_a_template(tmp_path):
    tree = {
        "layers": [{"w/x": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}, None],
        "pair": (jnp.int32(3), 2.5, True, "name", 7),
        "empty": [{}, (), jnp.zeros((0, 3), jnp.int32)],
        "key": jax.random.key(4),
        "mask": jnp.array([True, False]),
    }
    save(tmp_path / "tree", tree)
    assert_same(load(tmp_path / "tree"), tree)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree"]


def test_a_tree_without_arrays_is_saved_and_loaded(tmp_path):
    save(tmp_path / "nothing", {})
    assert load(tmp_path / "nothing") == {}


def test_trees_with_other_nodes_load_only_with_like(tmp_path):
    tree = {"point": Point(jnp.ones(2), jnp.zeros(3))}
    save(tmp_path / "tree", tree)
    with pytest.raises(ValueError, match=r"like: .* contains a Point"):
        load(tmp_path / "tree")
    assert_same(load(tmp_path / "tree", jax.eval_shape(lambda: tree)), tree)
    with pytest.raises(ValueError, match=r"\['point'\].y is float32\[3\] in the stored one, float32\[4\]"):
        load(tmp_path / "tree", {"point": Point(jnp.ones(2), jnp.zeros(4))})


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?"])
def test_paths_with_glob_characters_are_taken_literally(tmp_path, name):
    tree = {"a": np.arange(3.0), "b": {"c": np.ones((2, 2), np.int32)}}
    path = tmp_path / name / name
    path.parent.mkdir()
    save(path, tree)
    save(path, tree, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, load(path), tree)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_save_overwrites_only_with_overwrite_true(tmp_path):
    save(tmp_path / "tree", {"a": jnp.ones(1)})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(tmp_path / "tree", {"a": jnp.zeros(1)})
    assert load(tmp_path / "tree")["a"] == 1
    save(tmp_path / "tree", {"a": jnp.zeros(1)}, overwrite=True)
    assert load(tmp_path / "tree")["a"] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree"]


def test_save_names_the_path_of_a_leaf_that_is_not_an_array(tmp_path):
    with pytest.raises(ValueError, match=r"tree\['f'\]: got function"):
        save(tmp_path / "tree", {"f": assert_same})
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_a_missing_path_and_another_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: .*absent does not exist"):
        load(tmp_path / "absent")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"not written by jm.save: it has no manifest"):
        load(tmp_path / "photos")


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_checkpoint_round_trip(tmp_path, key):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 9)))
    state = new_state(optimizer=optimizer, key=key)._replace(step=jnp.int32(4))
    best = Best(3, Evaluation(0.1 + 0.2, 0.05, 20), jax.tree.map(lambda leaf: leaf + 1, state.params))
    save_checkpoint(tmp_path, state, best=best, config={"ways": (5, 3)})
    restored, restored_best = restore_checkpoint(
        tmp_path, new_state(optimizer=optimizer, key=key), config={"ways": [5, 3]}
    )
    assert_same(restored, state)
    assert restored_best[:2] == best[:2]
    assert_same(restored_best.params, best.params)
    assert_same(load_params(tmp_path), best.params)
    save_checkpoint(tmp_path, state._replace(step=jnp.int32(5)))
    assert restore_checkpoint(tmp_path, new_state(optimizer=optimizer, key=key))[1] is None
    assert_same(load_params(tmp_path), state.params)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(step)))
    assert checkpoint_steps(tmp_path) == [3, 10]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(step)))
    newest = tmp_path / "checkpoints" / "step-00000002"
    for file in (newest / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.warns(UserWarning, match=r"step-00000002: it does not match SHA256SUMS: arrays/"):
        assert int(restore_checkpoint(tmp_path, new_state())[0].step) == 1
    shutil.rmtree(newest / "manifest")
    with pytest.warns(UserWarning, match=r"has no manifest; the earlier step-00000001 in .* is used"):
        assert int(restore_checkpoint(tmp_path, new_state())[0].step) == 1
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001" / "manifest")
    with pytest.raises(ValueError, match=r"no checkpoint can be read in .*step-00000002: it has no manifest"):
        restore_checkpoint(tmp_path, new_state())


def test_unfinished_checkpoints_are_ignored(tmp_path):
    save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(1)))
    unfinished = tmp_path / "checkpoints" / ".step-00000002.unfinished"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", unfinished)
    assert checkpoint_steps(tmp_path) == [1]
    save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(2)))
    assert not unfinished.exists()
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(1)))

    for error, reason in ((OSError("power cut"), "power cut"), (OSError(27, "no room"), os.strerror(27))):

        def crash(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(ocp.Checkpointer, "save", crash)
        with pytest.raises(OSError, match=rf"cannot be written \({reason}\); nothing was replaced"):
            save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(2)))
    monkeypatch.undo()
    assert int(restore_checkpoint(tmp_path, new_state())[0].step) == 1


def test_restoring_without_a_checkpoint_raises(tmp_path):
    with pytest.raises(ValueError, match=r"run_dir: no checkpoint can be read in .*there is none"):
        restore_checkpoint(tmp_path, new_state())


def test_a_different_configuration_is_refused_by_key(tmp_path):
    save_checkpoint(tmp_path, new_state(), config={"tasks": {"ways": 5, "shots": 1}})
    with pytest.raises(ValueError, match=r"config\['tasks'\]\['shots'\] is 1 in the stored one, 5"):
        restore_checkpoint(tmp_path, new_state(), config={"tasks": {"ways": 5, "shots": 5}})
    with pytest.raises(ValueError, match=r"config\['order'\] is None in the stored one, 'first'"):
        restore_checkpoint(tmp_path, new_state(), config={"tasks": {"ways": 5, "shots": 1}, "order": "first"})
    with pytest.raises(ValueError, match=r"config\['tasks'\]\['shots'\] is 1 in the stored one, None"):
        restore_checkpoint(tmp_path, new_state(), config={"tasks": {"ways": 5}})
    with pytest.raises(
        ValueError, match=r"bias.* is float32\[8\] in the stored one, float32\[9\] in the new"
    ):
        restore_checkpoint(tmp_path, new_state(width=9))
    with pytest.raises(ValueError, match=r"\['state'\].opt_state.* is only in the stored one"):
        restore_checkpoint(tmp_path, new_state(optimizer=optax.sgd(0.1)))


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(1)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 300_000))
    with pytest.raises(OSError, match=r"too little disk space: 1.0 MB needed, 0.3 MB free"):
        save_checkpoint(tmp_path, new_state()._replace(step=jnp.int32(2)))
    assert checkpoint_steps(tmp_path) == [1]
    with pytest.raises(OSError, match="too little disk space"):
        save(tmp_path / "deep" / "tree", {"a": jnp.ones(3)})
    assert not (tmp_path / "deep").exists()


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, new_state())
    assert not [file for file in Path(path).rglob("*") if file.suffix in (".pkl", ".pickle", ".npy")]
