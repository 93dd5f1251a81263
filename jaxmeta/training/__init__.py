"""From a learner and its tasks to trained parameters and a number with a confidence interval.

`train` is one compiled loop of `meta_step`; the host only reports and, from a stream, hands each step its
images. `evaluate` tests on new tasks, `save` and `load` keep a state, `check_learner` lists what would keep a
learner of yours from training.

**Conventions.** Numbers are float32, JAX's default. Losses are means over examples; where the code of a paper
sums, the presets hold the step size that makes up for it.

**More devices.**

```sh
jaxmeta train --mesh tasks=8
jaxmeta train --mesh tasks=4,params=2
```

share the tasks of a meta-batch among eight devices, and split parameters over two besides, for networks that
outgrow one device. In Python: `jm.train(…, devices=jm.make_mesh(tasks=4, params=2))`. Every device draws its
own tasks from their keys, and there is one all-reduce of gradients a meta-step. The keys, not the devices,
determine the episodes: those of stored images are the same bit for bit on every mesh, also where a run is
resumed on fewer or more devices and hosts. Devices beyond the number of tasks each embed a share of a task's
examples, for learners that compare embeddings (`--devices N`, or `meta_step(…,
devices=jax.local_devices())`). A network of yours declares that it can be divided so by the class attribute
`divisible = True`: its examples must interact nowhere but in `jm.nn.BatchNorm`.

JAX sees a CPU as one device, however many cores it has: `JAX_NUM_CPU_DEVICES=8 python train.py` makes eight of
it, and `jaxmeta train` chooses the number itself.

**More hosts.**

```sh
jaxmeta train --out runs/pair --coordinator 10.0.0.1:1234 --processes 2 --process 0
jaxmeta train --out runs/cluster --distributed
```

train on two hosts, on the second with `--process 1`, and on all hosts on which Slurm, Kubernetes or a TPU pod
has started the line; in Python after `jax.distributed.initialize()`. A stream gives each process its share of
every batch. The hosts need one file system: all write the checkpoints, the first process everything else.

This replaces `pmap`: with a mesh the same compiled program runs on one device and on many, `jit` states how
arrays are laid out, the compiler splits what does not fit on one device, and arrays have no leading axis of
devices that another mesh would change. The step works under `pmap` as well, for programs that are built on
it: `test_under_pmap_it_is_the_same_step` in `tests/training/test_mesh.py` shows how.

**Resuming.** A run that was stopped continues bit for bit with `jaxmeta train --resume --out FOLDER`. SIGTERM
and SIGINT save first and end with status 75. Checkpoints hold SHA-256 sums; a damaged one is found, and the
one before it is used.

**A step that is not finite** ends the run, with the last good checkpoint. `--non-finite skip` leaves
parameters and optimizer as they were for that step, and counts it.

**Precision.** `--precision bfloat16` (`jm.nn.in_precision(network)`) computes the network in bfloat16, with
parameters, inner and meta-gradients and batch statistics in float32. `benchmarks/README.md` has the accuracy.

**Watching a run.** `jm.train(…, report=jm.progress_bar(), run_dir="runs/mine")` shows what `jaxmeta train`
shows, and keeps checkpoints and `metrics.jsonl`; `jaxmeta plot runs/mine` draws the curves and
`jm.load_run("runs/mine", learner=learner)` loads the parameters. `tensorboard --logdir runs` shows its curves; `--profile` records some meta-steps with
JAX's profiler, for TensorBoard or ui.perfetto.dev. Peak memory and compile time are in the report.
`--diagnose` reports how far first-order gradients are from second-order ones (`meta_gradient_alignment`).

**What was tried**, on 2 CPU cores, where devices are virtual and hosts are processes on one machine. Rows
without † run with `pytest -m "not slow"`; those with † were run by hand, most of them by `pytest -m slow`.

| what | result |
| --- | --- |
| a meta-step on 2 and 8 devices, with parameters whole or split over 2 and 4 | that of one device: float32 within 10⁻⁵, float64 within 10⁻¹² |
| training in 2 processes, and in 4 † (gloo), from memory and from a stream | the same two bounds |
| a run of 2 processes continued by one | that of one process within 10⁻⁵ |
| one of 2 processes killed † | the other ends within a minute: with advice and status 75, or, where the first was lost, by JAX's own abort and message; `--resume` continues |
| SIGKILL at 3, at 20 † random moments of a run that saves most of the time, resumed each time | parameters, optimizer state and best parameters equal to the uninterrupted run's, bit for bit |
| one bit changed, or the end cut off, at 100 random places of a checkpoint | all 100 found by its SHA-256 sums; the one before was used, with a warning |
| a disk that fills up while a checkpoint is written | status 1, the file and the reason; the last checkpoint is whole, and no partial file is left |
| bfloat16 in place of float32 †, on 3,000 meta-steps of MAML on Omniglot | the same accuracy within its interval; CPUs are slower in it |
| a file, a picture or a print that fails after a training or beside it, a last checkpoint that cannot be read back | all others are written and the result is printed; where a result is missing, status 1 and its name |
| SIGTERM, SIGINT | saved, status 75, `--resume` ends in the same bits; a transfer keeps its weights so far |
| invalid settings and files: over 600 tests by hypothesis, of every public function and of the command line | a `ValueError`, or status 2 and one line, that names the fault; no file is changed |

What a step would ask of 256 accelerators is predicted in `benchmarks/README.md`.
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
