"""The settings of a training and its evaluation, and how to speak of them to a user."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Preset:
    """A training and its evaluation, fully spelled. None: does not apply.

    Attributes:
      description: one line.
      tasks: a name in `TASKS`; a folder's path or a data set's name stands after its colon.
      learner: a name in `LEARNERS`.
      ways, shots, queries: of test and validation tasks; examples per class (per task in regression).
      train_ways, train_shots, train_queries: the same of training tasks.
      protocol: class split of Omniglot; see `jaxmeta.tasks.omniglot`.
      rotations: "none", "classes" or "random"; None is the protocol's own.
      image_size: side of images in pixels; None is the source's default.
      channels: 1 or 3; None is by the files.
      label: feature of a tensorflow-datasets set that names the class; None for the obvious one.
      tfds_splits: of such a set, to pool, with commas between; None for all.
      classes: class split of one's own images: "0.64,0.16,0.2", or the path of a JSON file.
      split_seed: of a class split by fractions.
      stream: whether examples come from disk, step by step, in place of the device's memory.
      workers: processes that read a stream; 0 reads in threads.
      skip_unreadable: leave out images that cannot be read.
      network: a name in `NETWORKS`.
      precision: what the network computes in; parameters and gradients are float32.
      norm: whose statistics normalise the queries in training; see `jm.maml`.
      inner_lr: step size α of the inner optimizer, for the MEAN loss over the support set; the initial one
        where it is learned.
      inner_steps: inner steps in training.
      eval_steps: inner steps at validation and test.
      report_steps: numbers of inner steps to report beside `eval_steps`.
      inner_batch: support examples in each inner step; None for all.
      order: "second", "first" or "implicit".
      memory: of the meta-gradient; see `jm.inner_loop`.
      truncation: inner steps between cuts of the meta-gradient.
      proximal: weight λ of the proximal term.
      cg_steps: of conjugate gradients, under "implicit".
      damping: of the same.
      anneal: part of the meta-steps in which MAML++'s loss moves to the last inner step.
      first_order: part of the meta-steps in which MAML++ is of first order.
      diagnose: whether to report cosine and ratio of norms between the meta-gradient and the first-order one.
      divergence: of embeddings from prototypes: "euclidean", "kl" or "cosine".
      similarity: of embeddings: "cosine", "dot", "euclidean" or "learned".
      reduce: what a class has of its examples' kernels: "sum", "mean", "nearest" or "prototype".
      scale: of cosines.
      head: of a baseline: "linear" or "cosine".
      context_steps: attention steps of full context embeddings; None for none.
      embedding_loss: of MetaNet: "xent", "contrastive" or "verification"; see `jm.metanet`.
      task_weights: which of MetaNet's networks have fast weights of the task: "none", "embedding" or "both".
      distort: whether training images are turned, sheared, scaled and shifted at random.
      sequence: steps of a sequence that the support set is, labels one step late; None for an ordinary one.
      strings: "letters,characters" where labels are strings of characters; None for class slots.
      within_alphabet: whether the classes of a task are letters of one alphabet, and other hands drew the
        queries.
      outer_lr: step size of the outer optimizer.
      schedule: of `outer_lr` over the run: "constant", "cosine" or "linear" (to zero).
      clip: bound on every entry of the meta-gradient; None leaves it as it is.
      steps: meta-steps.
      meta_batch: tasks per meta-step.
      strategy: over the tasks of a meta-step; see `jm.meta_step`.
      episodes: test episodes.
      validate_every: meta-steps between validations, which choose the parameters kept.
      non_finite: what becomes of a meta-step whose loss is not finite: "stop" the run, or "skip" it.
      log_every: meta-steps between looks at the loss.
    """

    description: str
    tasks: str
    learner: str = "maml"
    ways: int | None = 5
    shots: int = 1
    queries: int = 1
    train_ways: int | None = 5
    train_shots: int = 1
    train_queries: int = 1
    protocol: str | None = None
    rotations: str | None = None
    image_size: int | None = None
    channels: int | None = None
    label: str | None = None
    tfds_splits: str | None = None
    classes: str | None = None
    split_seed: int = 0
    stream: bool = False
    workers: int = 0
    skip_unreadable: bool = False
    network: str = "strided-conv4"
    precision: Literal["float32", "bfloat16"] = "float32"
    norm: str = "batch"
    inner_lr: float | None = 0.4
    inner_steps: int | None = 1
    eval_steps: int | None = 3
    report_steps: tuple[int, ...] = ()
    inner_batch: int | None = None
    order: str | None = "second"
    memory: str | None = "auto"
    truncation: int | None = None
    proximal: float | None = None
    cg_steps: int | None = None
    damping: float | None = None
    anneal: float | None = None
    first_order: float | None = None
    diagnose: bool | None = False
    divergence: str | None = None
    similarity: str | None = None
    reduce: str | None = None
    scale: float | None = None
    head: str | None = None
    context_steps: int | None = None
    embedding_loss: str | None = None
    task_weights: str | None = None
    distort: bool | None = None
    sequence: int | None = None
    strings: str | None = None
    within_alphabet: bool = False
    outer_lr: float = 1e-3
    schedule: str = "constant"
    clip: float | None = None
    steps: int = 60_000
    meta_batch: int = 32
    strategy: str | int = "auto"
    episodes: int = 1000
    validate_every: int = 1000
    non_finite: Literal["stop", "skip"] = "stop"
    log_every: int = 50

    @property
    def label_strings(self) -> tuple[int, int] | None:
        """Letters and characters of labels that are strings.

        Raises:
          ValueError: `strings` says something else.
        """
        if self.strings is None:
            return None
        try:
            letters, characters = map(int, self.strings.split(","))
        except ValueError:
            letters = characters = 0
        if letters < 2 or characters < 1:
            raise ValueError(f"--strings: got {self.strings}; it must be letters,characters such as 5,5")
        return letters, characters


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`, or a ValueError that lists what there is, the closest first."""
    if name in table:
        return table[name]
    raise ValueError(f"{kind}: there is no {name!r}; {known(name, table)}")


def known(name: str, names: Iterable[str]) -> str:
    """ "known are …", those most like `name` first."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return "known are " + ", ".join([*close, *(other for other in names if other not in close)])


def flag_of(field: str) -> str:
    """What the command line calls a setting."""
    return "--" + field.replace("_", "-")
