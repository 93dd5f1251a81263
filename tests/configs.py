"""Configurations of runs for tests, with settings by bare names."""

from jaxmeta.cli.config import Chosen, base_of, resolve

ORDER = ("tasks", "training", "run", "learner", "network")


def config_of(flags=None, **chosen):
    """Return the configuration of a run of chosen names, with flags by bare names in place of its values."""
    base = base_of(Chosen(**chosen))
    groups = base.names().groups()
    given = {}
    for name, value in (flags or {}).items():
        group = next(group for group in ORDER if name in groups[group])
        given.setdefault(group, {})[name] = value
    return resolve(base, given)
