import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxmeta import presets, registry, sources

NO_DATA = [
    name
    for name, preset in presets.PRESETS.items()
    if preset.tasks in ("glyphs", "sinusoid", "harmonic", "quadratics")
]


def test_every_preset_names_what_exists():
    for preset in presets.PRESETS.values():
        assert preset.learner in registry.LEARNERS
        assert preset.tasks in sources.TASKS
        assert preset.network in registry.NETWORKS
    for source in sources.TASKS.values():
        assert source.preset in presets.PRESETS


def test_every_task_source_has_a_preset_of_its_own():
    for name, source in sources.TASKS.items():
        assert presets.PRESETS[source.preset].tasks == name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("glyphs", "sinusoid") else pytest.mark.nightly)
        for name in NO_DATA
    ],
)
@pytest.mark.parametrize("learner", registry.LEARNERS)
def test_every_learner_builds_on_every_preset(name, learner):
    regression = presets.PRESETS[name].ways is None
    if regression and "regression" not in registry.LEARNERS[learner].kinds:
        with pytest.raises(ValueError, match=f"LEARNER: {learner} learns classification only"):
            presets.settings_of({}, learner=learner, preset=name)
        return
    if name == "glyphs-zero-shot" and not registry.LEARNERS[learner].zero_shot:
        with pytest.raises(ValueError, match=r"--shots: got 0|--inner-lr: "):
            presets.settings_of({}, learner=learner, preset=name)
        return
    # What minimises functions has no step size to hand on.
    needs = name == "quadratics" and "inner_lr" in registry.LEARNERS[learner].takes
    flags = {"inner_lr": 0.01, "network": "mlp-40"} if needs else {}
    _, settings = presets.settings_of(flags, learner=learner, preset=name)
    tasks = sources.tasks_of(settings, "train")
    method = presets.learner_of(settings)

    def loss(key, sample):
        task = sample(key)
        return method.loss(method.init(key, task), task, key)[0]

    assert jax.eval_shape(loss, jax.random.key(0), tasks.sample).shape == ()
    assert presets.optimizer_of(settings).init({}) is not None


@pytest.mark.parametrize(
    "name", [name for name in registry.LEARNERS if name not in ("maml", "learned_optimizer")]
)
def test_every_method_has_its_preset_on_omniglot(name):
    preset = f"omniglot-{name.replace('_', '-')}"
    _, by_preset = presets.settings_of({}, preset=preset)
    _, by_learner = presets.settings_of({}, learner=name, preset="omniglot")
    assert dataclasses.replace(by_preset, description="") == dataclasses.replace(by_learner, description="")
    # The same tasks, and the same budget but for the dearest, so that methods can be compared.
    maml = presets.PRESETS["omniglot"]
    dear = ("lstm_meta_learner", "metanet")
    own_budget = name in dear or registry.LEARNERS[name].family == "metric-based"
    budget = () if own_budget else ("steps", "meta_batch")
    for field in ("ways", "shots", "queries", "protocol", "episodes", *budget):
        assert getattr(by_preset, field) == getattr(maml, field), field


def test_a_learner_keeps_its_settings_on_another_s_preset_unless_told_otherwise():
    _, settings = presets.settings_of({}, learner="imaml", preset="glyphs")
    assert (settings.proximal, settings.inner_steps, settings.order) == (0.2, 16, None)
    _, settings = presets.settings_of({"inner_steps": 7}, learner="imaml", preset="glyphs")
    assert (settings.proximal, settings.inner_steps) == (0.2, 7)
    # MAML's own leave nothing behind.
    _, settings = presets.settings_of({}, learner="maml", preset="glyphs")
    assert settings == presets.PRESETS["glyphs"]


@pytest.mark.parametrize("choice", [{"learner": "reptile"}, {"preset": "omniglot-reptile"}])
def test_reptile_trains_with_ten_shots_for_each(choice):
    choice = {"preset": "omniglot", **choice}
    for flags, shots, train_shots in (
        ({}, 1, 10),
        ({"shots": 1}, 1, 10),
        ({"shots": 5}, 5, 50),
        ({"shots": 5, "train_shots": 7}, 5, 7),
    ):
        _, settings = presets.settings_of(flags, **choice)
        assert (settings.shots, settings.train_shots) == (shots, train_shots)
    back = presets.of_learner(presets.PRESETS["omniglot-reptile"], "maml")
    assert back.train_shots == 1


@pytest.mark.parametrize(
    ("ways", "shots", "step_size", "steps"),
    [(5, 1, 2.0, 1), (5, 5, 2.0, 1), (20, 1, 2.0, 5), (20, 5, 2.0, 5)],
)
def test_official_omniglot_presets_carry_the_factor_of_ways(ways, shots, step_size, steps):
    preset = presets.PRESETS[f"maml-omniglot-{ways}way-{shots}shot"]
    assert preset.inner_lr == pytest.approx(step_size)
    assert (preset.inner_steps, preset.steps) == (steps, 60_000)
    assert preset.queries == preset.train_queries == preset.shots == preset.train_shots == shots
    assert preset.ways == preset.train_ways == ways
    assert preset.protocol == "maml"


def test_test_protocol_goes_for_training_unless_told_otherwise():
    _, settings = presets.settings_of({"ways": 7, "shots": 2, "queries": 4, "train_shots": 3})
    assert (settings.ways, settings.shots, settings.queries) == (7, 2, 4)
    assert (settings.train_ways, settings.train_shots, settings.train_queries) == (7, 3, 4)


def test_a_preset_keeps_its_training_protocol_where_nothing_is_told():
    _, settings = presets.settings_of({}, preset="sinusoid")
    assert (settings.shots, settings.train_shots) == (5, 10)


def test_tasks_follow_the_protocol_of_their_part():
    _, settings = presets.settings_of({"tasks": "glyphs", "queries": 4, "train_queries": 2})
    assert sources.tasks_of(settings, "train").card.queries == 2
    assert sources.tasks_of(settings, "test").card.queries == 4
    assert sources.validation_tasks_of(settings).card.queries == 4


@pytest.mark.parametrize(("protocol", "validates"), [("vinyals", True), ("maml", True), ("reptile", False)])
def test_a_split_without_validation_classes_has_no_validation_tasks(protocol, validates):
    settings = dataclasses.replace(presets.PRESETS["omniglot"], protocol=protocol)
    assert sources.TASKS["omniglot"].has_validation(settings) is validates


def test_schedules_end_at_zero_and_constant_does_not():
    for schedule, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 1e-3)):
        settings = dataclasses.replace(presets.PRESETS["glyphs"], schedule=schedule, outer_lr=1e-3, steps=2)
        optimizer = presets.optimizer_of(settings)
        state, update = optimizer.init(1.0), None
        for _ in range(3):
            update, state = optimizer.update(1.0, state, 1.0)
        assert abs(float(update)) == pytest.approx(last, abs=1e-6)


def test_reptile_s_outer_optimizer_is_sgd_whose_rate_falls_linearly():
    _, settings = presets.settings_of({"steps": 4}, learner="reptile", preset="omniglot")
    optimizer = presets.optimizer_of(settings)
    state, updates = optimizer.init(jnp.ones(())), []
    for _ in range(5):
        update, state = optimizer.update(jnp.ones(()), state)
        updates.append(float(update))
    assert updates == [-1.0, -0.75, -0.5, -0.25, 0.0]


def test_clip_bounds_every_entry_before_adam():
    settings = dataclasses.replace(presets.PRESETS["glyphs"], clip=0.5)
    state = presets.optimizer_of(settings).init(1.0)
    _, state = presets.optimizer_of(settings).update(100.0, state, 1.0)
    assert float(state[1][0].mu) == pytest.approx(0.1 * 0.5)


@pytest.mark.parametrize(
    ("flags", "choice", "says"),
    [
        ({}, {"learner": "mamll"}, "known are maml, imaml, fomaml"),
        ({"tasks": "omniglott"}, {}, "known are omniglot"),
        ({}, {"preset": "sinus"}, "known are sinusoid"),
        ({"tasks": "glyphs"}, {"preset": "sinusoid"}, "--tasks: got glyphs"),
        ({"order": "first"}, {"learner": "fomaml"}, "--order: fomaml has no such setting"),
        ({"proximal": 1.0}, {"learner": "meta_sgd"}, "--proximal: meta_sgd has no such setting"),
        ({"inner_batch": 4}, {"learner": "imaml"}, "--inner-batch: imaml has no such setting"),
        ({"damping": 1.0}, {}, "--damping: is of --order implicit, and the order is second"),
        ({}, {"learner": "anil", "preset": "quadratics"}, "--inner-lr: the preset"),
        ({"queries": 5}, {"preset": "quadratics"}, "--queries: quadratics has no such setting"),
        (
            {"inner_lr": 0.1},
            {"learner": "lstm_meta_learner"},
            "--inner-lr: lstm_meta_learner has no such setting",
        ),
        ({"inner_batch": 0}, {"learner": "reptile"}, "--inner-batch: got 0"),
        ({"anneal": -0.1}, {"learner": "maml_plus_plus"}, "--anneal: got -0.1"),
        ({"tasks": "sinusoid", "ways": 5}, {}, "--ways: sinusoid has no such setting"),
        ({"rotations": "none"}, {}, "--rotations: glyphs has no such setting"),
        ({"data": "somewhere"}, {}, "--data: glyphs has no such setting"),
        ({"ways": 5, "train_ways": 7}, {}, "--ways: got 5"),
        ({"shots": 0}, {}, "--shots: got 0"),
        ({"steps": 0}, {}, "--steps: got 0"),
        ({"inner_lr": float("nan")}, {}, "--inner-lr: got nan"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, choice, says):
    with pytest.raises(ValueError, match=says):
        presets.settings_of(flags, **choice)
