"""Tests of killed runs, damaged checkpoints and full disks."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
import victim

import jaxmeta as jm
from jaxmeta.training.checkpoint import (
    Best,
    checkpoint_steps,
    load_params,
    restore_checkpoint,
    save_checkpoint,
)
from jaxmeta.training.evaluate import Evaluation

HERE = Path(__file__).parent


def start(folder, steps, limit=0):
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(HERE / "victim.py"), str(folder), str(steps), str(limit)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


@pytest.mark.nightly
@pytest.mark.parametrize("kills", [1, 3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(kills, tmp_path):
    rng, steps, cut_short = random.Random(kills), 16 * kills, 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    victim.main(whole, steps, limit=0)
    for _ in range(kills):
        process = start(killed, steps)
        for _ in range(rng.randint(1, 5)):
            process.stdout.readline()
        # A run spends nearly all of its time on writing checkpoints.
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        cut_short += any(".unfinished" in entry.name for entry in (killed / "checkpoints").iterdir())
    assert kills < 20 or cut_short > 2
    victim.main(killed, steps, limit=0)
    like = jm.training.init_state(toys.maml(width=64), toys.adam(), toys.sinusoid(), jax.random.key(0))
    actual, expected = (restore_checkpoint(folder, like) for folder in (killed, whole))
    assert int(actual[0].step) == steps
    assert_same(actual[0]._replace(key=0), expected[0]._replace(key=0))
    assert actual[1][:2] == expected[1][:2]
    assert_same(actual[1].params, expected[1].params)
    assert_same(jm.load(killed / "checkpoints" / "best"), jm.load(whole / "checkpoints" / "best"))


@cache
def state(step):
    initial = jm.training.init_state(toys.maml(), toys.adam(), toys.sinusoid(), jax.random.key(step))
    return initial._replace(step=jnp.int32(step))


@pytest.mark.parametrize("places", [6, pytest.param(100, marks=pytest.mark.nightly)])
def test_a_damaged_checkpoint_is_never_read_as_if_it_were_whole(places, tmp_path):
    # One bit is flipped, or the file truncated, at a random place. A warning names the checkpoint used.
    rng = random.Random(0)
    for step in (1, 2):
        best = Best(step, Evaluation(0.5, 0.1, 8), state(step).params)
        save_checkpoint(tmp_path / "run", state(step), best=best)
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    original = tmp_path / "original"
    shutil.copytree(newest, original)
    like = state(0)
    # By turns, all bytes are equally likely, so that large files are damaged most, and all files are.
    for number in range(places):
        sizes = [path.stat().st_size if number % 2 else 1 for path in files]
        path = rng.choices(files, sizes)[0]
        content = path.read_bytes()
        place = rng.randrange(len(content))
        if number % 3:
            changed = bytes([content[place] ^ 1 << rng.randrange(8)])
            path.write_bytes(content[:place] + changed + content[place + 1 :])
        else:
            path.write_bytes(content[:place])
        with pytest.warns(UserWarning, match=r"step-00000002: .*the earlier step-00000001 in .* is used"):
            restored, best = restore_checkpoint(tmp_path / "run", like)
        assert int(restored.step) == 1
        assert_same(restored.params, state(1).params)
        assert best.step == 1
        path.write_bytes(content)
    assert sorted(path.read_bytes() for path in files) == sorted(
        path.read_bytes() for path in original.rglob("*") if path.is_file()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(restore_checkpoint(tmp_path / "run", like)[0].step) == 2


def test_a_missing_or_an_added_file_is_damage(tmp_path):
    jm.save(tmp_path / "tree", {"a": jnp.ones(3)})
    (tmp_path / "tree" / "arrays" / "more").write_text("")
    with pytest.raises(ValueError, match=r"is damaged.*it does not match SHA256SUMS: arrays/more"):
        jm.load(tmp_path / "tree")
    (tmp_path / "tree" / "arrays" / "more").unlink()
    assert jm.load(tmp_path / "tree")["a"].sum() == 3
    (tmp_path / "tree" / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="its SHA256SUMS cannot be read"):
        jm.load(tmp_path / "tree")


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a process's files")
@pytest.mark.parametrize("limit", [10, 1000])
def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_last_checkpoint(limit, tmp_path):
    # With a limit of 10 bytes writing fails in Python's own files, with 1,000 in those of Orbax.
    process = start(tmp_path, 20, limit)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert out.split("saved ")[1:] == ["2\n"]
    assert "OSError: [Errno 27] cannot be written (File too large); nothing was replaced: " in errors
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-00000002"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint_steps(tmp_path) == [2]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(tmp_path)))
