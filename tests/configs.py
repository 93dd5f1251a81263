"""Run configurations for tests, from settings that are named without their groups."""

from jaxmeta.cli.config import Chosen, base_of, resolve

# A name that several groups have is set in the first of them.
ORDER = ("tasks", "training", "run", "learner", "network")


def config_of(flags=None, **chosen):
    """Return the run configuration of a preset, tasks or a learner, with `flags` in place of its values."""
    base = base_of(Chosen(**chosen))
    groups = base.names().groups()
    overrides = {}
    for name, value in (flags or {}).items():
        group = next(group for group in ORDER if name in groups[group])
        overrides.setdefault(group, {})[name] = value
    return resolve(base, overrides)
