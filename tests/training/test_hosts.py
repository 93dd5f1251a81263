"""Tests of training in several processes on this machine: they give the results of one, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import meta_runs
import numpy as np
import pytest
from jax.experimental import multihost_utils

import jaxmeta as jm
from jaxmeta.cli import main
from jaxmeta.training import hosts
from jaxmeta.training.checkpoint import checkpoint_steps

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment():
    # The environment of conftest without its number of CPU devices: each process has one device.
    drop = ("JAX_NUM_CPU_DEVICES",)
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {name: value for name, value in os.environ.items() if name not in drop} | {
        "PYTHONPATH": os.pathsep.join(paths)
    }


def start(command, processes):
    """Start processes, each with the arguments `command(port, process)`."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command(port, process)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]


def wait_for(members, seconds):
    """Return the outputs of processes after all have ended."""
    try:
        return [member.communicate(timeout=seconds)[0] for member in members]
    finally:
        for member in members:
            member.kill()


def together(processes, folder, *names):
    """Return the results of these runs, each shared by all processes."""
    members = start(
        lambda port, process: [
            str(HERE / "member.py"),
            *map(str, (port, processes, process, folder)),
            *names,
        ],
        processes,
    )
    outputs = wait_for(members, 500)
    assert [member.returncode for member in members] == [0] * processes, "\n".join(outputs)
    with jax.enable_x64(True):
        return jm.load(folder / f"results-{processes}")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Return the results of runs of two processes, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    return together(2, folder, "split", "streamed"), folder


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory):
    """Return the results of the runs of two processes that only nightly tests need, and their folder."""
    folder = tmp_path_factory.mktemp("two-more")
    return together(2, folder, "checkpointed", "float64"), folder


def assert_close(actual, expected, tolerance):
    for a, b in zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (actual, expected)), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["split", "streamed"])
def test_two_processes_give_the_parameters_of_one(name, of_two):
    assert_close(of_two[0][name], meta_runs.RUNS[name](None, meta_runs.SINGLE_PROCESS), 1e-5)


@pytest.mark.nightly
def test_two_processes_with_replicated_parameters_give_those_of_one(more_of_two):
    assert_close(
        more_of_two[0]["checkpointed"], meta_runs.RUNS["checkpointed"](None, meta_runs.SINGLE_PROCESS), 1e-5
    )


@pytest.mark.nightly
def test_two_processes_agree_with_one_to_1e_12_in_float64(more_of_two):
    assert more_of_two[0]["float64"]["hidden"].dtype == np.float64
    assert_close(more_of_two[0]["float64"], meta_runs.trained_in_float64(), 1e-12)


@pytest.mark.nightly
def test_one_process_resumes_a_run_of_two(more_of_two, tmp_path):
    folder = shutil.copytree(more_of_two[1] / "checkpointed", tmp_path / "run")
    assert checkpoint_steps(folder)[-1] == meta_runs.STEPS
    params = meta_runs.trained(folder, steps=12, resume=True)
    assert_close(params, meta_runs.trained(None, steps=12), 1e-5)


def test_parameters_written_in_parts_by_two_processes_are_read_by_one(of_two):
    assert checkpoint_steps(of_two[1] / "split")[-1] == meta_runs.STEPS
    assert_close(jm.training.load_params(of_two[1] / "split"), of_two[0]["split"], 0)


def test_an_array_that_both_processes_have_whole_is_written_once(of_two):
    np.testing.assert_array_equal(of_two[0]["replicated"], [0, 1, 2])


@pytest.mark.slow
def test_four_processes_give_the_parameters_of_one(tmp_path):
    results = together(4, tmp_path, *meta_runs.RUNS)
    for name in ("checkpointed", "split", "streamed"):
        assert_close(results[name], meta_runs.RUNS[name](None, meta_runs.SINGLE_PROCESS), 1e-5)
    assert_close(results["float64"], meta_runs.trained_in_float64(), 1e-12)


def train_command(out, *more):
    settings = ["--steps", "100000", "--validate-every", "20", "--meta-batch", "4", "--episodes", "4"]
    return lambda port, process: [
        *("-m", "jaxmeta.cli", "train", *settings, "--out", str(out), *more),
        *("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)),
    ]


@pytest.mark.nightly
def test_a_run_of_two_processes_ends_with_a_report_and_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    flags = [
        "--tasks",
        "sinusoid",
        "--steps",
        "20",
        "--episodes",
        "8",
        "--meta-batch",
        "2",
        "--network",
        "mlp",
    ]

    def command(port, process):
        joining = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)]
        more = ["--resume"] if (out / "report.json").exists() else flags
        return ["-m", "jaxmeta.cli", "train", *more, "--out", str(out), *joining]

    def run():
        members = start(command, 2)
        outputs = wait_for(members, 300)
        assert [member.returncode for member in members] == [0, 0], "\n".join(outputs)
        return json.loads((out / "report.json").read_text())["mse"]

    first = run()
    assert not (out / "parameters.npz").exists()
    # The second run starts from the checkpoint, from which each process reads all parameters.
    assert run() == first


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_process_ends_the_others_and_one_process_resumes_the_run(victim, tmp_path):
    out = tmp_path / "run"
    members = start(train_command(out), 2)
    deadline = time.monotonic() + 300
    while not checkpoint_steps(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    members[victim].send_signal(signal.SIGKILL)
    lost_at = time.monotonic()
    output = wait_for(members, 120)[1 - victim]
    assert time.monotonic() - lost_at < 60
    if victim:
        assert members[0].returncode == 75
        assert "another process of this run is lost" in output
        assert f"jaxmeta train --resume --out {out}" in output
    else:
        # JAX itself ends a process that can no longer reach the first one.
        assert members[1].returncode != 0
        assert "another task died" in output
    reached = checkpoint_steps(out)[-1]
    resumed = [*("-m", "jaxmeta.cli", "train", "--resume", "--out", str(out))]
    alone = subprocess.Popen(
        [sys.executable, *resumed],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while checkpoint_steps(out)[-1] <= reached and time.monotonic() < deadline + 300:
        time.sleep(0.2)
    alone.send_signal(signal.SIGTERM)
    assert f"continuing after meta-step {reached}" in wait_for([alone], 120)[0]
    assert alone.returncode == 75


NO_CLUSTER = "--distributed: no cluster was detected"


@pytest.mark.parametrize("flags", [[False, True], [True, True], [False, False]])
def test_any_of_is_true_if_a_flag_of_any_process_is(flags, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: len(flags))
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.array(flags))
    assert hosts.any_of(flags[0]) is any(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed"], NO_CLUSTER),
        (["--distributed", "--process", "0"], "--distributed: takes from the cluster what --process sets"),
        (["--coordinator", "127.0.0.1:1"], "--processes: is missing"),
    ],
)
def test_commands_that_cannot_connect_are_usage_errors(flags, message, tmp_path, monkeypatch, capsys):
    def find_no_cluster(coordinator, *_, **__):
        assert coordinator is None
        raise ValueError("coordinator_address should be defined.")

    # The real function fails here, because JAX is already in use in this process.
    monkeypatch.setattr(jax.distributed, "initialize", find_no_cluster)
    assert main(["train", "--out", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_missing_cluster_is_a_usage_error(tmp_path):
    command = [sys.executable, "-m", "jaxmeta.cli", "train", "--out", str(tmp_path / "run"), "--distributed"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert NO_CLUSTER in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "process: is missing"),
        ((None, 2, 0), "coordinator: is missing"),
        (("127.0.0.1", 2, 0), "coordinator: got '127.0.0.1'; it must be host:port"),
        (("127.0.0.1:0", 2, 0), "it must be host:port"),
        (("127.0.0.1:1", 0, 0), "processes: got 0"),
        (("127.0.0.1:1", 2, 2), "process: got 2; it must be from 0 to 1"),
    ],
)
def test_invalid_connection_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.connect(*arguments)
