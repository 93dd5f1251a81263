"""A program, started by `test_faults`, whose training run is killed.

    python tests/training/victim.py FOLDER STEPS LIMIT

It saves a checkpoint after every second meta-step and prints its step. After the first checkpoint no file may
grow beyond LIMIT bytes, which simulates a full disk; 0 means no limit.
"""

import sys
from pathlib import Path

import jax
import toys

import jaxmeta as jm
from jaxmeta.training import Saved
from jaxmeta.training.checkpoint import checkpoint_steps


def main(folder: Path, steps: int, limit: int) -> None:
    def report(event: object) -> None:
        if not isinstance(event, Saved):
            return
        print("saved", event.step, flush=True)
        if limit:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    try:
        jm.train(
            toys.maml(width=64),
            toys.sinusoid(),
            toys.adam(),
            steps=steps,
            key=jax.random.key(0),
            meta_batch=2,
            validation=toys.sinusoid(),
            validation_episodes=4,
            devices=jax.devices()[:1],
            validate_every=4,
            checkpoint_every=2,
            run_dir=folder,
            resume=bool(checkpoint_steps(folder)),
            report=report,
        )
    except OSError as error:
        sys.exit(f"OSError: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
