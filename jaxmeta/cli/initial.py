"""Initial parameters from a source: `jaxmeta train --init`."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta.checks import ArgumentError, join_names
from jaxmeta.cli.backbones import load_backbone
from jaxmeta.cli.build import MODEL
from jaxmeta.cli.config import INPUT, Base, Config, is_run, kind_of, read_json
from jaxmeta.cli.names import NETWORKS
from jaxmeta.cli.sources import renaming
from jaxmeta.core import Key, Learner, Params, TaskDistribution, TaskStream
from jaxmeta.nn.lora import NETWORK
from jaxmeta.training import hosts, load_params
from jaxmeta.training.step import drawn_params
from jaxmeta.transfer.subtree import leaves_by_path, transplant
from jaxmeta.transfer.weight_files import HUB

# Side of images with which the channels of a network for any size are looked up.
_ANY_SIDE = 64


def with_network_of(base: Base, source: str) -> Base:
    """Return the protocol with the network of a source of parameters, and with the input that it takes.

    For classification, a source other than a run also sets --outer-lr, to its default step size of
    fine-tuning. The protocol is returned as it is where the source's network is user-defined code or has no
    name.

    Args:
      base: protocol of a run.
      source: folder of `train` or `transfer`, or weights.

    Returns:
      The protocol.

    Raises:
      ArgumentError: the source cannot be read.
    """
    folder = Path(source).expanduser()
    # A source that does not exist is an error of `initial_params`, after those of the command line.
    if base.names().facts.networks is not None or not (source.startswith(HUB) or folder.exists()):
        return base
    if is_run(folder):
        if not (folder / "config.json").is_file():
            return base  # a folder of jm.train, which does not store its network
        # As JSON: loading the configuration of user-defined code would import that code.
        stored = read_json(folder / "config.json")
        try:
            settings = dict(stored["network"])
            name, input = settings.pop("name"), {each: stored["training"][each] for each in INPUT}
        except (KeyError, TypeError) as error:
            raise ArgumentError("init", f"{folder / 'config.json'} is damaged: {error!r}") from None
        if name not in NETWORKS:
            return base
    else:
        backbone = load_backbone(source, argument="init")
        network = backbone.network
        found = [each for each, factory in NETWORKS.items() if factory is type(network)]
        if not found:
            return base
        name = found[0]
        known = base._replace(network=name).names().groups()["network"]
        settings = {each: getattr(network, each) for each in known}
        channels = None if backbone.images is None else backbone.images.channels
        input = {
            "input_size": backbone.size,
            "input_channels": channels or backbone.channels(backbone.size or _ANY_SIDE, None),
            "input_mean": backbone.pixels.mean,
            "input_std": backbone.pixels.std,
            "input_method": backbone.pixels.method,
            "outer_lr": backbone.rate,
        }
    training = base.values["training"] | (input if kind_of(base.names().source) == "classification" else {})
    return base._replace(network=name, values={**base.values, "network": settings, "training": training})


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
    # Low-rank factors are new; what they are added to comes from the source.
    network = MODEL if config.training.lora is None else f"{MODEL}/{NETWORK}"
    head = f"{network}/head"
    arrays = {
        f"{network}{path.removeprefix(MODEL)}" if path.startswith(f"{MODEL}/") else path: leaf
        for path, leaf in _arrays_of(source).items()
    }
    fits = {path: np.shape(leaf) for path, leaf in arrays.items() if path in wanted}
    taken = [path for path, shape in fits.items() if shape == wanted[path].shape]
    body = [path for path in wanted if path.startswith(f"{network}/") and not path.startswith(head)]
    for path in body or wanted:
        if path not in taken:
            has = (
                f"there it has {fits[path]}" if path in fits else f"{source} has {join_names(sorted(arrays))}"
            )
            raise ArgumentError(
                "init",
                f"{source} does not fit the network {config.network['name']}: {path} must have shape "
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
    arrays = {f"{MODEL}/{path}": leaf for path, leaf in leaves_by_path(backbone.variables["params"]).items()}
    if backbone.head is not None:
        arrays |= {f"{MODEL}/head/{name}": leaf for name, leaf in backbone.head.items()}
    return arrays
