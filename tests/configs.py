"""Run configurations for tests, with settings by names without their groups."""

from jaxmeta.cli.config import Chosen, base_of, resolve

ORDER = ("tasks", "training", "run", "learner", "network")


def config_of(flags=None, **chosen):
    """Return a run configuration for chosen names, with `flags` replacing its values."""
    base = base_of(Chosen(**chosen))
    groups = base.names().groups()
    overrides = {}
    for name, value in (flags or {}).items():
        group = next(group for group in ORDER if name in groups[group])
        overrides.setdefault(group, {})[name] = value
    return resolve(base, overrides)
