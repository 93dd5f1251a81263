"""Benchmark of jaxmeta's meta-steps against those of PyTorch, eager and compiled, and of plain JAX.

The rows are second-order MAML, prototypical networks, memory-augmented networks, Meta Networks and the LSTM
meta-learner.

    python benchmarks/throughput.py [--rows omniglot …] [--quick] [--no-peers] [--loop] [--json FILE]

A meta-step is the loss of the tasks, its meta-gradient averaged over them, and an Adam update, with the same
network, number of weights, batch statistics and number format. Before the timing each peer's meta-gradient is
compared with ours at the same weights in float64. The first step is timed by itself, compilation included.

The contenders take turns in each round, so that other load on the machine affects all of them alike. A ratio
is the median over rounds of the peer's time divided by our time in the same round. A peer is timed in the
fastest of its forms: memory formats in PyTorch, all tasks at once or one by one in plain JAX. Ours is
`jm.meta_step` in one compiled loop over steps, as `jm.train` runs it, task sampling included, on as many
devices as divide the tasks or, where a task's examples can be sharded, on all devices
(`jm.train(devices=…)`); the peers get their tasks ready-made. Without PyTorch its peers are left out.
--quick times ours and the fastest eager peer of each row in a few short rounds.

Memory is what our compiled program allocates, arguments included, and on a GPU the most that PyTorch's
tensors take during a step.

Shapes and operation counts are in rows.py. The share of the machine's limit is relative to its fastest
float32 matrix product, timed in the same rounds.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

# JAX would otherwise reserve most of a GPU's memory, which the peers need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import jax_peers
import numpy as np
import optax
from machine import MatrixProduct, cores, describe_machine, program_bytes
from rows import ROWS

import jaxmeta as jm
from jaxmeta.cli.report import plural
from jaxmeta.training import sharding

TOLERANCE = 1e-8


def draw(pool, key):
    index = jax.random.randint(key, (), 0, pool.support.y.shape[0])
    return jax.tree.map(lambda leaf: leaf[index], pool)


def as_distribution(pool: jm.Task) -> jm.TaskDistribution:
    """Return a distribution over fixed tasks, which are an argument of the compiled step as real data are."""
    sample = jax.tree_util.Partial(draw, jax.tree.map(jnp.asarray, pool))
    return jm.TaskDistribution(sample, jm.ProtocolCard(tasks="fixed random images", split="train"))


class Ours:
    """`jm.meta_step` in a compiled loop whose length is an argument, as `jm.train` runs it."""

    def __init__(self, row, pool, order, strategy):
        self.row, self.strategy = row, row.strategy if strategy is None else strategy
        self.learner = row.learner(order)
        self.tasks = as_distribution(pool)
        self.optimizer = optax.adam(row.outer_lr)
        local = jax.local_devices()
        devices = (
            local if self.learner.divisible else local[: sharding.num_shards(row.meta_batch, len(local))]
        )
        mesh = sharding.task_mesh(row.meta_batch, devices, divisible=self.learner.divisible)
        step = jm.meta_step(self.learner, self.optimizer, row.meta_batch, self.strategy, devices=devices)
        state = jm.init_state(self.learner, self.optimizer, self.tasks, jax.random.key(0))
        self.params = jax.device_get(state.params)
        self.state = sharding.replicate(state, mesh)
        self.sample = sharding.replicate(self.tasks.sample, mesh)

        def loop(state, sample, count):
            return jax.lax.fori_loop(0, count, lambda _, state: step(state, sample)[0], state)

        started = time.perf_counter()
        lowered = jax.jit(loop, donate_argnums=0).lower(self.state, self.sample, jnp.int32(0))
        self.compiled = lowered.compile()
        self.memory_bytes = program_bytes(self.compiled)
        self.steps(1)
        self.first_step_s = time.perf_counter() - started

    def gradient(self, params, pool):
        """Return the mean meta-gradient over the tasks of `pool` at `params`, by the meta-step itself."""
        # This outer optimizer stores the gradient; the meta-batch consists of copies of one task.
        keep = optax.trace(decay=0.0)
        step = jax.jit(jm.meta_step(self.learner, keep, self.row.meta_batch, self.strategy))
        count, total = len(pool.support.y), None
        for i in range(count):
            one = as_distribution(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], pool))
            start = jax.tree.map(jnp.asarray, params)
            state = jm.TrainState(jnp.int32(0), start, keep.init(start), jax.random.key(i))
            gradient = jax.device_get(step(state, one.sample)[0].opt_state.trace)
            total = gradient if total is None else jax.tree.map(np.add, total, gradient)
        return jax.tree.map(lambda leaf: leaf / count, total)

    def steps(self, count):
        self.state = jax.block_until_ready(self.compiled(self.state, self.sample, jnp.int32(count)))

    def finite(self):
        return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(self.state.params)))


def gradient_error(ours: dict, theirs: dict) -> float:
    """Return the largest ‖ours − theirs‖ / ‖ours‖ of any array.

    Biases of convolutions are left out. Batch normalisation subtracts them together with the mean, so that
    their gradient is zero up to rounding.
    """
    return np.max(
        [
            np.linalg.norm(leaf - theirs[name]) / np.linalg.norm(leaf)
            for name, leaf in ours.items()
            if not ("conv" in name.lower() and name.endswith("bias"))
        ]
    ).item()


def make_peers(row, ours, order, pool, device, names, *, quick=False):
    """Return the named peers, each in its fastest form, checked against our gradient.

    Gradients are compared in float64, because in float32 two implementations may resolve a near-tie of a
    max-pool or ReLU differently, and the gradient then jumps by that pixel's share.

    If `quick`, only the fastest of these peers is checked and returned.
    """
    rng = np.random.default_rng(1)
    # At the initial zeros and ones some terms of the gradient vanish, and their errors would go unnoticed.
    params = jax.tree.map(
        lambda leaf: leaf.astype(np.float64) + rng.normal(scale=0.1, size=leaf.shape) * max(leaf.std(), 0.5),
        ours.params,
    )
    two = jax.tree.map(
        lambda leaf: leaf[:2].astype(np.float64 if leaf.dtype == np.float32 else leaf.dtype), pool
    )
    with jax.enable_x64(True):
        expected = ours.gradient(params, two)
    two, pool = ((t.support.x, t.support.y, t.query.x, t.query.y) for t in (two, pool))

    def fastest_form(name):
        """Return a peer in its best form: `(step_s, form, first_step_s, peer, tensors)`."""
        candidates = []
        for form in kind_of_peer(name, row).forms(name):
            peer = kind_of_peer(name, row)(name, row, ours.params, device, order, form)
            tensors = peer.tensors(pool)
            first, *seconds = (time_step(peer, tensors) for _ in range(3 if quick else 6))
            candidates.append((min(seconds), form, first, peer, tensors))
        return min(candidates, key=lambda candidate: candidate[0])

    fastest = {name: fastest_form(name) for name in names}
    if quick:
        best = min(fastest, key=lambda name: fastest[name][0])
        fastest = {best: fastest[best]}
    peers = {}
    for name, (_, form, first, peer, tensors) in fastest.items():
        kind = kind_of_peer(name, row)
        with jax.enable_x64(True):
            gradient = kind(name, row, params, device, order, form).gradient(two)
        error = gradient_error(kind.from_ours(expected, row), gradient)
        if not error <= TOLERANCE:
            raise AssertionError(
                f"{name}, {form}: got a meta-gradient in float64 that differs from ours by {error:.0e}, "
                f"relative; it must differ by at most {TOLERANCE:.0e}; correct the peer, or time ours alone "
                "by --no-peers"
            )
        peers[name] = {
            "steps": lambda count, peer=peer, tensors=tensors: peer.steps(count, tensors),
            "gradient_error": error,
            "form": form,
            "first_step_s": first,
            "memory_bytes": peer.peak_memory(tensors),
        }
    return peers


def kind_of_peer(name, row):
    """Return the class of the peer `name` for a row."""
    if name == jax_peers.NAME:
        return jax_peers.Peer
    import torch_peers

    return torch_peers.kind_of(row)


def time_step(peer, tensors) -> float:
    """Return the seconds of one step of a peer."""
    started = time.perf_counter()
    peer.steps(1, tensors)
    return time.perf_counter() - started


def time_rounds(contenders: dict, rate, repeats: int, seconds: float) -> tuple[dict, list[float]]:
    """Return the seconds per step of each contender, and the matrix-product rate, in each round."""
    counts = {}
    for name, steps in contenders.items():
        steps(1)
        started = time.perf_counter()
        steps(1)
        counts[name] = max(1, round(seconds / (time.perf_counter() - started)))
    times, rates = {name: [] for name in contenders}, []
    for _ in range(repeats):
        for name, steps in contenders.items():
            started = time.perf_counter()
            steps(counts[name])
            times[name].append((time.perf_counter() - started) / counts[name])
        rates.append(rate())
    return times, rates


def time_loop(row, ours, repeats, steps):
    """Return the rate of `jm.train` relative to the bare compiled step, one ratio per round."""
    ratios = []
    for repeat in range(repeats):
        events = []
        jm.train(
            ours.learner,
            ours.tasks,
            ours.optimizer,
            steps=steps,
            key=jax.random.key(repeat),
            meta_batch=row.meta_batch,
            strategy=ours.strategy,
            report=events.append,
        )
        in_loop = steps / sum(
            (event.step - before) / event.steps_per_second
            for before, event in zip([0, *(e.step for e in events)], events, strict=False)
        )
        started = time.perf_counter()
        ours.steps(steps)
        ratios.append(in_loop * (time.perf_counter() - started) / steps)
    return ratios


def torch_setting(platform_name, precision):
    """Return `(device, description)` of PyTorch, or `(None, reason)` where it cannot run."""
    if importlib.util.find_spec("torch") is None:
        return None, "PyTorch is not installed: not timed"
    import torch
    import torch_peers

    device = {"cpu": "cpu", "gpu": "cuda" if torch.cuda.is_available() else None}.get(platform_name)
    if device is None:
        return None, f"PyTorch cannot use this {platform_name}: not timed"
    return device, torch_peers.configure(cores(), precision in ("highest", "float32"))


def run_row(name, args, torch_device, matrix) -> dict:
    """Time one row and print its table."""
    row = ROWS[name]
    pool = row.tasks(row.meta_batch, seed=0)
    ours = Ours(row, pool, args.order, args.strategy)
    names = [peer for peer in args.peer_names if peer in row.peers]
    peers = make_peers(row, ours, args.order, pool, torch_device, names, quick=args.quick) if names else {}
    contenders = {"jaxmeta": ours.steps, **{name: peer["steps"] for name, peer in peers.items()}}
    times, rates = time_rounds(contenders, matrix.run, args.repeats, args.seconds)
    if not ours.finite():
        raise AssertionError(f"{name}: our parameters became non-finite")

    count = row.operations(args.order)
    shares = [count / seconds / rate for seconds, rate in zip(times["jaxmeta"], rates, strict=True)]
    result = {
        "row": name,
        "setting": dataclasses.asdict(row),
        "operations": count,
        "matrix_product_flops": statistics.median(rates),
        "share_of_matrix_product": statistics.median(shares),
        "limit_s": count / statistics.median(rates),
        "contenders": {},
    }
    for contender, seconds in times.items():
        ratios = [s / ours_s for s, ours_s in zip(seconds, times["jaxmeta"], strict=True)]
        peer = peers.get(contender, {})
        result["contenders"][contender] = {
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "tasks_per_s": row.meta_batch / statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "first_step_s": peer.get("first_step_s", ours.first_step_s),
            "memory_bytes": peer["memory_bytes"] if peer else ours.memory_bytes,
            **{key: peer[key] for key in ("gradient_error", "form") if key in peer},
            "seconds": seconds,
        }
    print_row(result)
    if args.loop:
        ratios = time_loop(row, ours, args.loop_rounds, args.loop_steps)
        result["loop"] = {"ratio": statistics.median(ratios), "ratios": ratios, "steps": args.loop_steps}
        print(
            f"  jm.train's own loop runs at {statistics.median(ratios):.1%} of the bare compiled step's rate"
        )
    return result


def print_row(result: dict) -> None:
    row = ROWS[result["row"]]
    print(f"\n{result['row']}: {row.describe()}, {plural(row.meta_batch, 'task')}")
    print(
        f"  {'':19}{'median ms':>10}{'min ms':>9}{'tasks/s':>9}{'× ours':>8}{'first step':>12}"
        f"{'memory':>11}  gradient against ours"
    )
    for name, times in result["contenders"].items():
        note = ""
        if "gradient_error" in times:
            note = f"  differs by {times['gradient_error']:.0e}, {times['form']}"
        memory = "" if times["memory_bytes"] is None else f"{times['memory_bytes'] / 1e6:,.0f} MB"
        print(
            f"  {name:19}{1e3 * times['median_s']:10.1f}{1e3 * times['min_s']:9.1f}"
            f"{times['tasks_per_s']:9.1f}{times['ratio']:8.2f}{times['first_step_s']:10.1f} s"
            f"{memory:>11}{note}"
        )
    print(
        f"  {result['operations'] / 1e9:.2f} GFLOP would take {1e3 * result['limit_s']:.1f} ms at the "
        f"{result['matrix_product_flops'] / 1e9:.0f} GFLOP/s of this machine's matrix product: "
        f"ours reaches {result['share_of_matrix_product']:.0%} of the limit",
        flush=True,
    )


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="shapes to time")
    add("--quick", action="store_true", help="3 rounds, with the fastest eager peer of each row alone")
    add("--repeats", type=int, help="rounds to take the median over (default: 9; quick: 3)")
    add("--seconds", type=float, default=0.5, help="approximate time of each contender in a round")
    add("--order", choices=("second", "first"), default="second", help="order of the meta-gradient")
    add("--strategy", help="auto, scan, vmap, or a number of tasks at a time (default: as each row sets)")
    add("--precision", default="highest", help="precision of JAX's matrix products; highest is float32")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="also time the peers")
    add("--loop", action=argparse.BooleanOptionalAction, default=False, help="also time jm.train")
    add("--loop-steps", type=int, default=100, help="meta-steps of each run of jm.train")
    add("--loop-rounds", type=int, default=3, help="runs of jm.train")
    add("--devices", type=int, default=cores(), help="number of devices to divide a CPU into")
    add("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    if args.repeats is None:
        args.repeats = 3 if args.quick else 9
    if args.strategy is not None and args.strategy.isdigit():
        args.strategy = int(args.strategy)
    return args


def main(argv=None) -> None:
    args = parse_arguments(argv)
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_default_matmul_precision", args.precision)
    # With their caches, the first steps would measure reading files.
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        run(args)


def run(args) -> None:
    """Time all rows, print their tables and write the JSON file."""
    devices = jax.local_devices()
    machine = describe_machine(devices)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    torch_device, note, args.peer_names = None, "peers not timed", []
    if args.peers and devices[0].platform == "tpu":
        note = "peers not timed, because a TPU lacks the float64 in which they are checked"
    elif args.peers:
        torch_device, note = torch_setting(devices[0].platform, args.precision)
        args.peer_names = [] if args.quick else [jax_peers.NAME]
    print(f"MAML in {args.order} order; matrix products in {args.precision!r} precision; {note}")
    if torch_device is not None:
        import torch_peers

        wanted = torch_peers.EAGER if args.quick else torch_peers.NAMES
        absent = [peer for peer in wanted if importlib.util.find_spec(peer.split(".")[0]) is None]
        args.peer_names = [peer for peer in wanted if peer not in absent] + args.peer_names
        for peer in absent:
            print(f"{peer} is not installed: not timed")
    matrix = MatrixProduct(devices)
    rows = [run_row(name, args, torch_device, matrix) for name in args.rows]
    if args.json:
        report = {
            "machine": machine,
            "peers": note,
            "settings": {
                key: getattr(args, key) for key in ("order", "strategy", "precision", "repeats", "seconds")
            },
            "matrix_product": {"size": matrix.size, "devices": matrix.devices},
            "jaxmeta": jm.__version__,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
