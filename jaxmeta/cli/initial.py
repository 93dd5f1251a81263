"""Start meta-training from what a source has learned: `train --init`."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta.checks import ArgumentError, some
from jaxmeta.cli.backbones import load_backbone
from jaxmeta.cli.config import Config, is_run
from jaxmeta.cli.sources import renaming
from jaxmeta.core import Key, Learner, Params, TaskDistribution, TaskStream
from jaxmeta.training import hosts, load_params
from jaxmeta.training.step import drawn_params
from jaxmeta.transfer.subtree import leaves_by_path, transplant

# Where a learner keeps its network's parameters, and what is new where the classes are.
_NETWORK, _HEAD = "model", "model/head"


def initial_params(
    source: str, config: Config, learner: Learner, tasks: TaskDistribution | TaskStream, key: Key
) -> Params:
    """Return the parameters that `learner.init` draws, with those of a source in their place.

    The network must be the source's, save its head, which is taken where it has the same shape. Of a run of
    the same learner the method's own parameters are taken too, such as learned step sizes. What is taken and
    what is new is printed.

    Args:
      source: a folder of `train` or `transfer`, or weights.
      config: of the new run.
      learner: of the new run.
      tasks: to train on.
      key: of the new run.

    Raises:
      ArgumentError: the source has another network.
    """
    drawn = drawn_params(learner, tasks, key)
    wanted = leaves_by_path(drawn)
    given = _learned(source)
    fits = {path: np.shape(leaf) for path, leaf in given.items() if path in wanted}
    taken = [path for path, shape in fits.items() if shape == wanted[path].shape]
    body = [path for path in wanted if path.startswith(f"{_NETWORK}/") and not path.startswith(_HEAD)]
    for path in body or wanted:
        if path not in taken:
            has = f"there it has {fits[path]}" if path in fits else f"{source} has {some(sorted(given))}"
            raise ArgumentError(
                "init",
                f"{source} has another network than {config.network['name']} here: {path} must have shape "
                f"{wanted[path].shape}, and {has}",
            )
    found, report = transplant({path: given[path] for path in taken}, drawn, take=taken, cast=True)
    new = [str(row.target) for row in report.new]
    if hosts.is_first():
        print(
            f"init      {source}: {len(taken)} of {len(wanted)} arrays"
            + (f"; new: {some(new)}" if new else "")
        )
    return found


def _learned(source: str) -> dict[str, Any]:
    """Return the arrays of a source by the paths that they have in a learner."""
    if is_run(folder := Path(source).expanduser()):
        with renaming({"run_dir": "init"}):
            return leaves_by_path(load_params(folder))
    backbone = load_backbone(source, argument="init")
    assert backbone.variables is not None
    found = {
        f"{_NETWORK}/{path}": leaf for path, leaf in leaves_by_path(backbone.variables["params"]).items()
    }
    if backbone.head is not None:
        found |= {f"{_HEAD}/{name}": leaf for name, leaf in backbone.head.items()}
    return found
