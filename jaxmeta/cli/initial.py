"""Initial parameters from a source: `jaxmeta train --init`."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta.checks import ArgumentError, join_names
from jaxmeta.cli.backbones import load_backbone
from jaxmeta.cli.config import Config, is_run
from jaxmeta.cli.sources import renaming
from jaxmeta.core import Key, Learner, Params, TaskDistribution, TaskStream
from jaxmeta.training import hosts, load_params
from jaxmeta.training.step import drawn_params
from jaxmeta.transfer.subtree import leaves_by_path, transplant

# Paths of the network in a learner's parameters, and of its head, which is new where the classes are.
_NETWORK, _HEAD = "model", "model/head"


def initial_params(
    source: str, config: Config, learner: Learner, tasks: TaskDistribution | TaskStream, key: Key
) -> Params:
    """Return the parameters that `learner.init` draws, with a source's parameters in place of them.

    The network must be the source's, except for its head, which is taken where it has the same shape. A run
    of the same learner also gives the learner's own parameters, such as learned step sizes. The number of
    arrays taken and the names of new ones are printed.

    Args:
      source: folder of `train` or `transfer`, or weights.
      config: configuration of the new run.
      learner: learner of the new run.
      tasks: training tasks.
      key: key of the initial parameters.

    Returns:
      The parameters.

    Raises:
      ArgumentError: the source has another network.
    """
    drawn = drawn_params(learner, tasks, key)
    wanted = leaves_by_path(drawn)
    arrays = _arrays_of(source)
    fits = {path: np.shape(leaf) for path, leaf in arrays.items() if path in wanted}
    taken = [path for path, shape in fits.items() if shape == wanted[path].shape]
    body = [path for path in wanted if path.startswith(f"{_NETWORK}/") and not path.startswith(_HEAD)]
    for path in body or wanted:
        if path not in taken:
            has = (
                f"there it has {fits[path]}" if path in fits else f"{source} has {join_names(sorted(arrays))}"
            )
            raise ArgumentError(
                "init",
                f"{source} has another network than {config.network['name']} here: {path} must have shape "
                f"{wanted[path].shape}, but {has}",
            )
    params, report = transplant({path: arrays[path] for path in taken}, drawn, take=taken, cast=True)
    new = [str(row.target) for row in report.new]
    if hosts.is_first():
        print(
            f"init      {source}: {len(taken)} of {len(wanted)} arrays"
            + (f"; new: {join_names(new)}" if new else "")
        )
    return params


def _arrays_of(source: str) -> dict[str, Any]:
    """Return the arrays of a source by their paths in a learner's parameters."""
    if is_run(folder := Path(source).expanduser()):
        with renaming({"run_dir": "init"}):
            return leaves_by_path(load_params(folder))
    backbone = load_backbone(source, argument="init")
    assert backbone.variables is not None
    arrays = {
        f"{_NETWORK}/{path}": leaf for path, leaf in leaves_by_path(backbone.variables["params"]).items()
    }
    if backbone.head is not None:
        arrays |= {f"{_HEAD}/{name}": leaf for name, leaf in backbone.head.items()}
    return arrays
