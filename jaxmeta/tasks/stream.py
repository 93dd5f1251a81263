"""Episodes from data larger than the device memory, read ahead by Grain."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from jaxmeta.checks import ArgumentError, check_count, check_key, check_kind
from jaxmeta.core import Key, Rotations, SplitName, Task, TaskStream, episode_keys
from jaxmeta.tasks.domains import DomainTable
from jaxmeta.tasks.episodes import Drawn, EpisodeShape, draw_rows, make_task, names_of_slots
from jaxmeta.tasks.prepared import PartRows, Prepared
from jaxmeta.tasks.splits import Classes, hash_for_card, split_classes

# Steps are int32, so the stream has a formal end.
_END = 2**31 - 1


def stream(
    prepared: Prepared,
    *,
    key: Key,
    meta_batch: int,
    ways: int | tuple[int, int],
    shots: int | tuple[int, int],
    queries: int = 1,
    split: SplitName = "train",
    classes: Classes = "auto",
    split_seed: int = 0,
    rotations: Rotations = "none",
    protocol: str = "",
    across: bool = False,
    test_domains: Sequence[str] | None = None,
    skip_small_classes: bool = False,
    for_evaluation: bool = False,
    workers: int = 0,
    ahead: int = 4,
    process: tuple[int, int] = (0, 1),
) -> TaskStream:
    """Return few-shot tasks drawn from records on disk, for data that do not fit on the device.

    The episodes are the same as those that `from_prepared` draws from memory: `jm.train` with the same
    `key` uses the same tasks. The keys determine the images of a step, which are read and assembled while
    the device computes earlier steps.

    Args:
      prepared: images from `prepare_folder` or `prepare_tfds`.
      key: key of the run (the `key` of `jm.train`) or of the evaluation.
      meta_batch: tasks per meta-step, summed over all processes.
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      split: "train", "validation" or "test".
      classes: class split: the fractions of train, validation and test for a random split seeded by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`;
        in Python also such a mapping or a `ClassSplit`. "auto": the data's own parts (folders or lists
        train, val and test) where these share no class, else the fractions 0.64,0.16,0.2. None: every part
        draws from all classes.
      split_seed: seed of the random class split; must be 0 where `classes` names the classes. Episodes depend
        only on the key of the stream.
      rotations: rotations of the images: "none"; "classes", each class rotated by 90, 180 and 270° is an
        additional class; or "random", one random rotation per class and episode.
      protocol: one sentence for the protocol card; if empty, the card describes how classes are split.
      across: whether support and queries of a class are from different domains, see `from_arrays`.
      test_domains: names of domains held out for test, see `from_arrays`.
      skip_small_classes: whether to skip, with a warning, classes with fewer than shots + queries images,
        after the classes are split.
      for_evaluation: whether to number the episodes as `jm.evaluate(key=key)` does, `meta_batch` at a time.
      workers: number of processes that read images; 0 for threads, which are enough for prepared images.
        Processes are spawned, so a script needs `if __name__ == "__main__":`.
      ahead: number of batches to read ahead; each worker process buffers as many in addition.
      process: (index, count) of this process among the processes that divide each batch, such as
        `(jax.process_index(), jax.process_count())`. The stream then yields the share of this process;
        `jm.train` accepts either the share or the whole batch.

    Raises:
      ValueError: see `from_arrays`; a `process` out of range; or a `meta_batch` that is not a multiple
        of the number of processes.

    Examples:
      >>> images = jm.tasks.prepare_folder("photos", size=84)  # doctest: +SKIP
      >>> tasks = jm.tasks.stream(images, key=key, meta_batch=4, ways=5, shots=1)  # doctest: +SKIP
      >>> state = jm.train(learner, tasks, optimizer, steps=1000, key=key, meta_batch=4)  # doctest: +SKIP
    """
    check_kind("prepared", prepared, Prepared, "images of prepare_folder or prepare_tfds")
    check_key("key", key)
    shape = EpisodeShape.checked(ways, shots, queries, rotations, prepared.shape)
    classes, sentence = prepared.class_split(classes)
    parts, protocol = split_classes(prepared.classes, classes, split_seed, split, protocol or sentence)
    part = prepared.part_rows(
        parts.ordered(split),
        shape,
        split,
        across=across,
        test_domains=test_domains,
        skip_small_classes=skip_small_classes,
    )
    split_hash = hash_for_card(parts, split, classes)
    protocol = part.protocol(protocol)
    card = shape.card_for(part.names, part.sizes, split, split_hash, prepared.name, protocol, part.table)
    check_count("meta_batch", meta_batch)
    check_count("workers", workers, 0)
    check_count("ahead", ahead)
    index, count = process
    if not 0 <= index < count:
        raise ArgumentError("process", f"got {process}; it must be (index, count) with 0 <= index < count")
    if meta_batch % count:
        raise ArgumentError(
            "meta_batch",
            f"got {meta_batch} tasks for {count} processes; it must be a multiple of the number of processes",
        )
    share = meta_batch // count
    reader = _Reader(prepared, shape, part, key, meta_batch, index * share, share, for_evaluation)

    def names_at(step: int) -> np.ndarray:
        return names_of_slots(shape, part.names, reader.plan(step))

    def assembled(read: tuple[Drawn, np.ndarray]) -> Task:
        return _assemble(shape, *read)

    def at(step: int) -> Task:
        return assembled(reader(step))

    def batches(start: int) -> Iterator[Task]:
        import grain

        options = grain.ReadOptions(num_threads=min(ahead, 4), prefetch_buffer_size=ahead)
        data = grain.MapDataset.range(start, _END).map(reader).to_iter_dataset(options)
        if workers:
            _parse_flags()
            partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead),
                worker_init_fn=partial(_set_up_worker, partitionable),
            )
        iterator = iter(data)
        try:
            yield from map(assembled, iterator)
        finally:
            iterator.close()

    return TaskStream(at, card, batches, key, for_evaluation, names_at)


class _Reader:
    """The function `step -> (drawn, stored examples)`; it can be pickled for worker processes."""

    def __init__(
        self,
        prepared: Prepared,
        shape: EpisodeShape,
        part: PartRows,
        key: Key,
        meta_batch: int,
        first: int,
        share: int,
        for_evaluation: bool,
    ):
        self.prepared, self.shape, self.for_evaluation = prepared, shape, for_evaluation
        self.rows, self.sizes = part.rows, np.array(part.sizes, np.int32)
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self.domains = None
        if part.table is not None:
            self.domains = part.table._replace(counts=np.asarray(part.table.counts, np.int32))
        # The key is stored as numbers, since a key array would need a device in the worker process.
        self.key_impl, self.key_data = str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key))
        self.meta_batch, self.first, self.share = meta_batch, first, share

    def plan(self, step: int) -> Drawn:
        """Return which examples the tasks of a step are made of."""
        first = self.first + (step * self.meta_batch if self.for_evaluation else 0)
        with _on_host():
            key = jax.random.wrap_key_data(jnp.asarray(self.key_data), impl=self.key_impl)
            fold = None if self.for_evaluation else jnp.uint32(step)
            indices = first + jnp.arange(self.share)
            plan = _plan(self.shape, self.offsets, self.sizes, self.domains, key, fold, indices)
            return jax.device_get(plan)

    def __call__(self, step: int) -> tuple[Drawn, UInt8[np.ndarray, "tasks ways count size"]]:
        drawn = self.plan(step)
        images = self.prepared.read(self.rows[np.asarray(drawn.rows).reshape(-1)])
        return drawn, images.reshape(*drawn.rows.shape, -1)


@partial(jax.jit, static_argnums=0)
def _plan(
    shape: EpisodeShape,
    offsets: Array,
    sizes: Array,
    domains: DomainTable | None,
    key: Key,
    fold: Array | None,
    indices: Array,
) -> Drawn:
    keys = episode_keys(key if fold is None else jax.random.fold_in(key, fold), indices)[:, 0]
    return jax.vmap(partial(draw_rows, shape, offsets, sizes, domains=domains))(keys)


@partial(jax.jit, static_argnums=0)
def _assemble(shape: EpisodeShape, drawn: Drawn, images: Array) -> Task:
    shots = shape.shots[1]
    return jax.vmap(lambda drawn, x: make_task(shape, drawn, x[:, :shots], x[:, shots:]))(drawn, images)


def _on_host() -> contextlib.AbstractContextManager[None]:
    """Return a context that computes on the CPU, since the host needs the drawn rows immediately."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return contextlib.nullcontext()


def _set_up_worker(partitionable: bool, worker: int, workers: int) -> None:
    """Configure JAX in a worker process: accelerators belong to the training process."""
    del worker, workers
    jax.config.update("jax_platforms", "cpu")
    # This setting changes the random numbers of a key.
    jax.config.update("jax_threefry_partitionable", partitionable)


def _parse_flags() -> None:
    """Parse absl's flags, which Grain's worker processes read, if the program has not done so."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["jaxmeta"])
