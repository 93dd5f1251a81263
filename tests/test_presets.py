"""Presets, configurations from presets with other learners, tasks and flags, and outer optimizers."""

import jax
import jax.numpy as jnp
import pytest
from configs import config_of

from jaxmeta.cli import build, names, schema, sources
from jaxmeta.cli.config import Chosen, base_of, from_json
from jaxmeta.cli.presets import PRESETS
from jaxmeta.declare import facts_of

NO_DATA = ["glyphs", "sinusoid", "harmonic", "quadratics", "glyphs-zero-shot"]


def test_every_preset_resolves():
    for name, preset in PRESETS.items():
        placeholder = preset.get("tasks", "").partition(":")[0] in ("folder", "arrays", "table", "tfds")
        config = config_of(
            preset=name, tasks=f"{preset['tasks'].partition(':')[0]}:x" if placeholder else None
        )
        assert config.preset == name
        assert preset["description"]


def test_every_task_source_has_its_preset():
    for key, source in sources.TASKS.items():
        assert PRESETS[source.preset]["tasks"] == key


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=[] if name in ("glyphs", "sinusoid") else pytest.mark.nightly)
        for name in NO_DATA
    ],
)
@pytest.mark.parametrize(
    "learner",
    [
        # tests/test_learner_laws.py builds each learner by default.
        pytest.param(name, marks=[] if name in ("maml", "prototypical", "mann") else pytest.mark.nightly)
        for name in names.LEARNERS
    ],
)
def test_every_learner_builds_on_every_preset(preset, learner):
    facts = facts_of(names.LEARNERS[learner])
    if preset in ("sinusoid", "harmonic", "quadratics") and "regression" not in facts.kinds:
        with pytest.raises(ValueError, match=f"learner: {learner} learns classification, but"):
            config_of(preset=preset, learner=learner)
        return
    if preset == "glyphs-zero-shot" and not facts.zero_shot:
        with pytest.raises(ValueError, match=r"shots: got 0"):
            config_of(preset=preset, learner=learner)
        return
    # On quadratics a learned optimizer trains a linear network, and other learners need another one.
    network = "mlp-40" if preset == "quadratics" else None
    config = config_of(preset=preset, learner=learner, network=network)
    tasks = sources.tasks_of(config, "train")
    method = build.learner_of(config)

    def loss(key, sample):
        task = sample(key)
        return method.loss(method.init(key, task), task, key)[0]

    assert jax.eval_shape(loss, jax.random.key(0), tasks.sample).shape == ()
    assert build.optimizer_of(config).init({}) is not None


@pytest.mark.parametrize(
    "name", [name for name in names.LEARNERS if name not in ("maml", "learned_optimizer")]
)
def test_every_method_has_its_preset_on_omniglot(name):
    by_preset = config_of(preset=f"omniglot-{name.replace('_', '-')}")
    by_learner = config_of(learner=name, preset="omniglot")
    for group in ("learner", "network", "tasks", "training", "run"):
        assert by_preset.settings(group) == by_learner.settings(group)
    # The same tasks, and the same budget except for the most expensive, so that methods can be compared.
    maml = config_of(preset="omniglot")
    assert by_preset.run.episodes == maml.run.episodes
    for field in ("ways", "shots", "queries", "protocol"):
        assert by_preset.tasks[field] == maml.tasks[field], field
    own_budget = name in ("lstm_meta_learner", "metanet") or not facts_of(names.LEARNERS[name]).head
    if not own_budget and name != "mann":
        assert (by_preset.training.steps, by_preset.training.meta_batch) == (6000, 16)


def test_a_learner_keeps_its_settings_on_another_s_preset_unless_set():
    config = config_of(learner="imaml", preset="glyphs")
    assert (config.learner["proximal"], config.learner["inner_steps"]) == (0.2, 16)
    assert "order" not in config.learner
    config = config_of({"inner_steps": 7}, learner="imaml", preset="glyphs")
    assert (config.learner["proximal"], config.learner["inner_steps"]) == (0.2, 7)


def test_settings_of_a_preset_apply_to_methods_that_share_a_factory():
    assert config_of(learner="anil", tasks="sinusoid").learner["inner_lr"] == 0.002
    # CAVIA's step size is that of other parameters.
    assert config_of(learner="cavia", tasks="sinusoid").learner["inner_lr"] == 1.0


def test_anneal_steps_follow_the_number_of_meta_steps():
    for steps in (6000, 50):
        config = config_of({"steps": steps}, learner="maml_plus_plus", preset="omniglot")
        assert config.learner["anneal_steps"] == steps // 10
    config = config_of({"steps": 50, "anneal_steps": 3}, learner="maml_plus_plus", preset="omniglot")
    assert config.learner["anneal_steps"] == 3


@pytest.mark.parametrize("choice", [{"learner": "reptile"}, {"preset": "omniglot-reptile"}])
def test_reptile_trains_with_ten_times_the_shots(choice):
    choice = {"preset": "omniglot", **choice}
    for flags, shots, train_shots in (
        ({}, 1, 10),
        ({"shots": 1}, 1, 10),
        ({"shots": 5}, 5, 50),
        ({"shots": 5, "train_shots": 7}, 5, 7),
    ):
        config = config_of(flags, **choice)
        assert (config.tasks["shots"], config.tasks["train_shots"]) == (shots, train_shots)
    back = config_of(learner="maml", preset="omniglot-reptile")
    assert back.tasks["train_shots"] == 1


@pytest.mark.parametrize(
    ("ways", "shots", "step_size", "steps"),
    [(5, 1, 2.0, 1), (5, 5, 2.0, 1), (20, 1, 2.0, 5), (20, 5, 2.0, 5)],
)
def test_official_omniglot_presets_scale_the_step_size_by_ways(ways, shots, step_size, steps):
    config = config_of(preset=f"maml-omniglot-{ways}way-{shots}shot")
    assert config.learner["inner_lr"] == pytest.approx(step_size)
    assert (config.learner["inner_steps"], config.training.steps) == (steps, 60_000)
    for name in ("queries", "train_queries", "shots", "train_shots"):
        assert config.tasks[name] == shots
    assert config.tasks["ways"] == config.tasks["train_ways"] == ways
    assert config.tasks["protocol"] == "maml"


def test_training_has_the_shape_of_test_tasks_unless_set():
    tasks = config_of({"ways": 7, "shots": 2, "queries": 4, "train_shots": 3}).tasks
    assert (tasks["ways"], tasks["shots"], tasks["queries"]) == (7, 2, 4)
    assert (tasks["train_ways"], tasks["train_shots"], tasks["train_queries"]) == (7, 3, 4)


def test_a_preset_keeps_its_shape_of_training_tasks_by_default():
    tasks = config_of(preset="sinusoid").tasks
    assert (tasks["shots"], tasks["train_shots"]) == (5, 10)


def test_tasks_have_the_shape_of_their_split():
    config = config_of({"queries": 4, "train_queries": 2}, tasks="glyphs")
    assert sources.tasks_of(config, "train").card.queries == 2
    assert sources.tasks_of(config, "test").card.queries == 4
    assert sources.validation_tasks_of(config).card.queries == 4


@pytest.mark.parametrize(("protocol", "validates"), [("vinyals", True), ("maml", True), ("reptile", False)])
def test_a_split_without_validation_classes_has_no_validation_tasks(protocol, validates, data_folder):
    config = config_of({"protocol": protocol, "data": str(data_folder / "omniglot")}, tasks="omniglot")
    assert (sources.validation_tasks_of(config) is not None) is validates


def test_configurations_survive_json(tmp_path):
    for chosen in ({"preset": "mann-omniglot-strings"}, {"learner": "metanet"}, {"tasks": "sinusoid"}):
        config = config_of(**chosen)
        assert from_json(config.to_json(), tmp_path / "config.json") == config


def test_schedules_end_at_their_last_rate():
    for schedule, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 1e-3), ("step", 0.25e-3)):
        flags = {"schedule": schedule, "outer_lr": 1e-3, "steps": 2}
        flags |= {"decay_every": 1} if schedule == "step" else {}
        optimizer = build.optimizer_of(config_of(flags))
        state, update = optimizer.init(1.0), None
        for _ in range(3):
            update, state = optimizer.update(1.0, state, 1.0)
        assert abs(float(update)) == pytest.approx(last, abs=1e-6)


def test_reptile_s_outer_optimizer_is_sgd_whose_rate_falls_linearly():
    optimizer = build.optimizer_of(config_of({"steps": 4}, learner="reptile", preset="omniglot"))
    state, updates = optimizer.init(jnp.ones(())), []
    for _ in range(5):
        update, state = optimizer.update(jnp.ones(()), state)
        updates.append(float(update))
    assert updates == [-1.0, -0.75, -0.5, -0.25, 0.0]


def test_clip_bounds_every_entry_before_adam():
    optimizer = build.optimizer_of(config_of({"clip": 0.5}))
    _, state = optimizer.update(100.0, optimizer.init(1.0), 1.0)
    assert float(state[1][0].mu) == pytest.approx(0.1 * 0.5)


@pytest.mark.parametrize(
    ("flags", "choice", "message"),
    [
        ({}, {"learner": "mamll"}, "learner: there is no 'mamll'; known are maml, imaml, fomaml"),
        ({}, {"tasks": "omniglott"}, "tasks: there is no 'omniglott'; known are omniglot"),
        ({}, {"tasks": "folder:"}, "tasks: got folder:; give your PATH after the colon"),
        ({}, {"preset": "sinus"}, "preset: there is no 'sinus'; known are sinusoid"),
        (
            {},
            {"tasks": "glyphs", "preset": "sinusoid"},
            "tasks: got glyphs, but preset sinusoid is for sinusoid",
        ),
        (
            {},
            {"learner": "prototypical", "tasks": "sinusoid"},
            "learner: prototypical learns classification, but",
        ),
        ({}, {"learner": "mann", "network": "conv4"}, "network: got conv4; mann works with lrua"),
        ({"norm": "episode"}, {}, "norm: got episode; maml has batch, support"),
        ({"ways": 5, "train_ways": 7}, {}, "ways: got 5"),
        ({"shots": 0}, {}, "shots: got 0"),
        ({"steps": 0}, {}, "steps: got 0"),
        ({"outer_lr": float("nan")}, {}, "outer_lr: got nan"),
        ({"decay_every": 3}, {}, "decay_every: got 3, but --schedule is cosine"),
        ({"schedule": "step"}, {}, "decay_every: is missing; --schedule step needs"),
        ({"strings": (5, 5)}, {"learner": "mann"}, "strings: needs tasks as sequences; add --sequence"),
        ({"diagnose": True, "order": "first"}, {}, "diagnose: compares with the first-order"),
        ({"workers": 2}, {"tasks": "folder:x"}, "workers: only a stream is read by processes; add --stream"),
    ],
)
def test_incompatible_settings_are_errors_that_name_one(flags, choice, message):
    with pytest.raises(ValueError, match=message):
        config_of(flags, **choice)


@pytest.mark.parametrize(
    ("choice", "absent"),
    [
        ({"learner": "fomaml"}, ["order", "proximal"]),
        ({"learner": "meta_sgd"}, ["proximal", "damping"]),
        ({"learner": "imaml"}, ["inner_batch", "order"]),
        ({"learner": "lstm_meta_learner"}, ["inner_lr"]),
        ({"learner": "maml"}, ["distort", "context_steps"]),
        ({"preset": "quadratics"}, ["queries", "ways"]),
        ({"tasks": "sinusoid"}, ["ways"]),
        ({"tasks": "glyphs"}, ["rotations", "data", "stream", "workers"]),
        ({"tasks": "omniglot"}, ["stream", "workers"]),
    ],
)
def test_a_run_has_no_settings_of_other_methods_and_tasks(choice, absent):
    groups = base_of(Chosen(**choice)).names().groups()
    for name in absent:
        assert not any(name in settings for settings in groups.values()), name


def test_every_built_in_setting_has_help():
    """Flags have their help from docstrings."""
    factories = [*names.LEARNERS.values(), *names.NETWORKS.values()]
    factories += [source.function for source in sources.TASKS.values()]
    for factory in factories:
        width = names.width_name(factory) if factory in names.NETWORKS.values() else None
        supplied = {"norm", "loss", "augment", "strings", "ways", "out", "split", "data", width}
        for name, setting in schema.settings_of(factory, supplied).items():
            assert setting.help, f"{schema.name_of(factory)}: {name}"
