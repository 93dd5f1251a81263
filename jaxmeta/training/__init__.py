"""Training and evaluation: compiled steps, devices, checkpoints and confidence intervals.

`train` runs a compiled loop of `meta_step`; the host only reports progress and, for a stream, supplies the
images of each step. `evaluate` tests on new tasks, `save` and `load` store and restore a state, and
`check_learner` lists the problems that would prevent training of your own learner.

**Conventions.** Numbers are float32, JAX's default. Losses are means over examples; if the code of a paper
uses sums, the presets rescale its step size accordingly.

**Multiple devices.**

```sh
jaxmeta train --mesh tasks=8
jaxmeta train --mesh tasks=4,params=2
```

The first command shares the tasks of a meta-batch among eight devices. The second shares them among four pairs
of devices and splits the parameters within each pair, for networks that do not fit on one device. In Python:
`jm.train(…, devices=jm.make_mesh(tasks=4, params=2))`. Every device draws its own tasks from their keys, and
there is one all-reduce of gradients per meta-step. The keys, not the devices, determine the episodes: episodes
of stored images are bit-identical on every mesh, also if a run is resumed on another number of devices or
hosts. If there are more devices than tasks, each device embeds a share of a task's examples, for learners that
compare embeddings (`--devices N`, or `meta_step(…, devices=jax.local_devices())`). Your own network declares
with the class attribute `divisible = True` that its examples can be divided in this way: they must not interact
except in `jm.nn.BatchNorm`.

JAX treats a CPU as one device regardless of its number of cores. `JAX_NUM_CPU_DEVICES=8 python train.py` splits
it into eight devices, and `jaxmeta train` chooses the number automatically.

**Multiple hosts.**

```sh
jaxmeta train --out runs/pair --coordinator 10.0.0.1:1234 --processes 2 --process 0
jaxmeta train --out runs/cluster --distributed
```

The first command trains on two hosts; run it with `--process 1` on the second host. The second command trains on
all hosts on which Slurm, Kubernetes or a TPU pod starts it. In Python, call `jax.distributed.initialize()`
first. A stream gives each process its share of every batch. The hosts need a shared file system: all of them
write the checkpoints, and the first process writes all other files.

A mesh replaces `pmap`: the same program runs on one device and on many, `jit` specifies the sharding of arrays,
the compiler partitions arrays that do not fit on one device, and arrays have no leading device axis that depends
on the mesh. The step also works under `pmap`, for programs that are built on it:
`test_the_meta_step_under_pmap_is_the_same_step` in `tests/training/test_mesh.py` shows how.

**Resuming.** `jaxmeta train --resume --out FOLDER` continues an interrupted run, with bit-identical results. On
SIGTERM and SIGINT the run saves its state and exits with status 75. Checkpoints contain SHA-256 checksums; a
damaged checkpoint is detected, and the previous one is used.

**Non-finite steps.** A non-finite meta-step ends the run, and the last good checkpoint is kept. With
`--non-finite skip` such a step does not change parameters and optimizer state, and is counted.

**Precision.** `--precision bfloat16` (`jm.nn.in_precision(network)`) computes the network in bfloat16, with
parameters, inner and meta-gradients and batch statistics in float32. `benchmarks/README.md` reports the accuracy.

**Monitoring a run.** `jm.train(…, report=jm.progress_bar(), run_dir="runs/mine")` shows the same progress as
`jaxmeta train`, and writes checkpoints and `metrics.jsonl`; `jaxmeta plot runs/mine` draws the curves and
`jm.load_run("runs/mine", learner=learner)` loads the parameters. `tensorboard --logdir runs` shows the curves of
runs of `jaxmeta train`; its flag `--profile` records some meta-steps with JAX's profiler, for TensorBoard or
ui.perfetto.dev. Peak memory and compile time are in the report. `--diagnose` reports how much first-order
gradients differ from second-order ones (`meta_gradient_alignment`).

**Tested scenarios**, on 2 CPU cores, where devices are virtual and hosts are processes on one machine. Rows
without † are covered by `pytest -m "not slow"`; rows with † were run manually, most of them by `pytest -m slow`.

| scenario | result |
| --- | --- |
| a meta-step on 2 and 8 devices, with parameters replicated or split over 2 and 4 | the result of one device, within 10⁻⁵ in float32 and 10⁻¹² in float64 |
| training in 2 processes, and in 4 † (gloo), from memory and from a stream | the same, within the same bounds |
| a run of 2 processes resumed by one process | the result of one process, within 10⁻⁵ |
| one of 2 processes killed † | the other exits within a minute: with instructions and status 75 or, if the first process was killed, with JAX's own abort and message; `--resume` continues the run |
| SIGKILL at 3 (20 †) random moments of a run that is saving most of the time, resumed after each | parameters, optimizer state and best parameters are bit-identical to those of the uninterrupted run |
| one bit flipped, or the end cut off, at 100 random positions of a checkpoint | all 100 detected by the SHA-256 checksums; the previous checkpoint was used, with a warning |
| a disk that fills up while a checkpoint is written | exit status 1, and a message with the file and the reason; the last checkpoint is intact, and no partial file is left |
| bfloat16 instead of float32 †, for 3,000 meta-steps of MAML on Omniglot | the same accuracy within its confidence interval; slower on CPUs |
| failure to write a file, a figure or a line of output during or after training, or to read back the last checkpoint | all other outputs are written, and the result is printed; if a result is missing, exit status 1 and its name |
| SIGTERM, SIGINT | the state is saved, exit status 75; `--resume` gives bit-identical results; a transfer run keeps its weights so far |
| invalid settings and files: over 600 tests with hypothesis, of every public function and of the command line | a `ValueError`, or exit status 2 and a message of one line, that names the problem; no file is changed |

The cost of a meta-step on 256 accelerators is predicted in `benchmarks/README.md`.
"""  # noqa: E501

from jaxmeta.training.check_learner import check_learner
from jaxmeta.training.checkpoint import load, load_params, save
from jaxmeta.training.diagnostics import Alignment, meta_gradient_alignment
from jaxmeta.training.evaluate import (
    ClassEvaluation,
    Episodes,
    Evaluation,
    calibrate,
    evaluate,
    evaluate_classes,
    evaluate_episodes,
    evaluate_metrics,
    run_episodes,
)
from jaxmeta.training.events import Progress, Resumed, Saved, Validated
from jaxmeta.training.export import export
from jaxmeta.training.loop import NonFiniteLoss, Stopped, train
from jaxmeta.training.progress import progress_bar
from jaxmeta.training.sharding import make_mesh
from jaxmeta.training.step import TrainState, init_state, meta_step, validation_key

__all__ = [
    "Alignment",
    "ClassEvaluation",
    "Episodes",
    "Evaluation",
    "NonFiniteLoss",
    "Progress",
    "Resumed",
    "Saved",
    "Stopped",
    "TrainState",
    "Validated",
    "calibrate",
    "check_learner",
    "evaluate",
    "evaluate_classes",
    "evaluate_episodes",
    "evaluate_metrics",
    "export",
    "init_state",
    "load",
    "load_params",
    "make_mesh",
    "meta_gradient_alignment",
    "meta_step",
    "progress_bar",
    "run_episodes",
    "save",
    "train",
    "validation_key",
]
