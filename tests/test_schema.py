"""Settings from signatures and docstrings, and parsers built from them."""

import functools
from collections.abc import Callable
from typing import Literal

import pytest
from flax import linen

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import schema
from jaxmeta.cli.parser import Group, HelpShown, Parser, UsageError, of_function
from jaxmeta.declare import facts_of, forwards, learner


def method(
    network,
    *,
    rate: float = 0.1,
    steps: int | None = None,
    order: Literal["second", "first"] = "second",
    widths: tuple[int, ...] = (4, 2),
    scales: tuple[float, float] = (0.5, 1.0),
    shared: bool = False,
    picks: str | Callable[[str], bool] | None = None,
    loss: Callable = max,
):
    """Build a method.

    Args:
      network: any network.
      rate: step size. It must not be negative.
      steps, order: settings of the descent.
      widths: widths of layers.
    """


def test_settings_are_the_keyword_only_parameters_of_plain_type():
    settings = schema.settings_of(method)
    assert list(settings) == ["rate", "steps", "order", "widths", "scales", "shared", "picks"]
    assert settings["rate"].default == 0.1
    assert settings["rate"].help == "step size"
    assert settings["rate"].about == "step size. It must not be negative."
    assert settings["steps"].about == settings["order"].about == "settings of the descent."
    # Members of a union that are not plain are ignored.
    assert settings["picks"].hint == str | None
    assert next(iter(schema.settings_of(method, ["rate", "widths"]))) == "steps"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "3e-2", 0.03),
        ("steps", "7", 7),
        ("steps", "none", None),
        ("order", "first", "first"),
        ("widths", "8, 4,2", (8, 4, 2)),
        ("scales", "1,2", (1.0, 2.0)),
        ("picks", "head/*", "head/*"),
    ],
)
def test_text_of_a_flag_becomes_a_value_of_its_type(name, text, value):
    parsed = schema.settings_of(method)[name].parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rate", "fast", "rate: got fast; it must be a number"),
        ("steps", "1.5", "steps: got 1.5; it must be a whole number or none"),
        ("order", "third", "order: got third; it must be one of second, first"),
        ("widths", "4,x", "widths: got 4,x; it must be whole numbers separated by commas"),
        ("scales", "1,2,3", "scales: got 1,2,3; it must be 2 numbers separated by commas"),
    ],
)
def test_text_of_another_type_is_an_error(name, text, expected):
    with pytest.raises(ArgumentError) as error:
        schema.settings_of(method)[name].parse(text)
    assert str(error.value) == expected


@pytest.mark.parametrize("value", ["1", 1.5, True, [1], {"a": 1}])
def test_values_of_config_json_are_checked_for_their_type(value):
    with pytest.raises(ArgumentError, match="steps: got"):
        schema.settings_of(method)["steps"].check(value)


def test_values_of_config_json_are_restored():
    settings = schema.settings_of(method)
    values = {"rate": 1, "steps": None, "order": "first", "widths": [3], "scales": [1, 2.5]}
    values |= {"shared": True, "picks": None}
    checked = schema.checked("learner", values, settings)
    assert checked["widths"] == (3,)
    assert checked["scales"] == (1.0, 2.5)
    with pytest.raises(ArgumentError, match=r"learner\.rat: is unknown; the settings are rate, steps"):
        schema.checked("learner", {**values, "rat": 1}, settings)
    del values["rate"]
    with pytest.raises(ArgumentError, match=r"learner\.rate: is missing"):
        schema.checked("learner", values, settings)
    with pytest.raises(ArgumentError, match="learner: got 3"):
        schema.checked("learner", 3, settings)


@pytest.mark.parametrize("value", [0.0012345678, 1e-8, 3.0, (0.5, 1e30), (), None, 7, "a"])
def test_the_text_of_a_value_parses_to_the_value(value):
    def function(*, setting: float | int | tuple[float, ...] | str | None = None): ...

    hints = {float: float, int: int, str: str, type(None): int | None, tuple: tuple[float, ...]}
    setting = schema.settings_of(function)["setting"]._replace(hint=hints[type(value)])
    assert setting.parse(schema.shown_value(value)) == value


def test_literals_of_numbers_are_checked_and_parsed():
    def function(*, share: Literal[0.1, 0.5] = 0.1, kind: int | Literal["auto"] = "auto"): ...

    settings = schema.settings_of(function)
    assert settings["share"].parse("0.5") == settings["share"].check(0.5) == 0.5
    assert (settings["kind"].parse("3"), settings["kind"].check("auto"), settings["kind"].check(3)) == (
        3,
        "auto",
        3,
    )
    with pytest.raises(ArgumentError, match=r"share: got 0\.2; it must be one of 0\.1, 0\.5"):
        settings["share"].check(0.2)
    with pytest.raises(ArgumentError, match="kind: got"):
        settings["kind"].check("slow")


def test_a_required_parameter_without_a_plain_type_is_an_error():
    def method_with_loss(network, *, loss: Callable, rate: float = 1.0): ...

    with pytest.raises(ArgumentError, match="loss: method_with_loss requires it, but it is of type"):
        schema.settings_of(method_with_loss)
    assert list(schema.settings_of(method_with_loss, ["loss"])) == ["rate"]


def test_parameters_without_annotation_have_the_type_of_their_default():
    def plain(network, *, context=5, rate=0.5, name="a", loss=max): ...

    settings = schema.settings_of(plain)
    assert {name: setting.hint for name, setting in settings.items()} == {
        "context": int,
        "rate": float,
        "name": str,
    }


class Net(linen.Module):
    """A network.

    Attributes:
      width: width of the layer.
    """

    out: int | None = None
    width: int = 8
    activation: Callable = linen.relu


def test_fields_of_a_flax_module_are_settings():
    settings = schema.settings_of(Net, ["out"])
    assert list(settings) == ["width"]
    assert settings["width"].help == "width of the layer"
    # A variant has its own defaults, and fixes the values that are not plain.
    variant = functools.partial(Net, width=3, activation=linen.tanh)
    assert schema.settings_of(variant, ["out"])["width"].default == 3


def test_a_factory_that_forwards_has_the_settings_of_its_parent():
    @forwards(method, without=("order",))
    def first(network, *, rate: float = 0.5, **settings):
        """Build a first-order method.

        Args:
          rate: another step size.
        """
        return method(network, rate=rate, order="first", **settings)

    settings = schema.settings_of(first)
    assert "order" not in settings
    assert (settings["rate"].default, settings["rate"].help) == (0.5, "another step size")
    assert settings["widths"].help == "widths of layers"
    with pytest.raises(TypeError, match=r"first\(\) has no argument 'order'; it takes rate, steps"):
        first(None, order="second")


def test_facts_are_declared_and_inherited():
    @learner(kinds=("classification",), head=False)
    def parent(network, *, rate: float = 0.1): ...

    @forwards(parent)
    def child(network, **settings): ...

    assert facts_of(parent).head is facts_of(child).head is False
    assert facts_of(method).kinds == ("classification", "regression")
    with pytest.raises(ValueError, match="fact: got 'kind'"):
        learner(kind="classification")
    with pytest.raises(ValueError, match="kinds: got 'ranking'"):
        learner(kinds=("ranking",))


def test_a_transductive_method_has_one_row():
    @learner(transductive=True)
    def by_default(network): ...

    @learner(transductive=True, rows={"transductive": "population"})
    def by_population(network): ...

    assert facts_of(by_default).rows == {"transductive": "batch"}
    assert facts_of(by_population).rows == {"transductive": "population"}
    with pytest.raises(ValueError, match="rows: got inductive; a transductive method has one row"):
        learner(transductive=True, rows={"inductive": "support"})


def parser_of(*groups):
    return Parser("train", [Group(name, name, settings, {}) for name, settings in groups], owner="this")


def test_parsed_values_contain_no_defaults():
    parser = parser_of(("learner", schema.settings_of(method)))
    parsed = parser.parse(["--rate", "2", "--shared", "--widths=1,2"])
    assert parsed.values == {"learner": {"rate": 2.0, "shared": True, "widths": (1, 2)}}
    assert parsed.texts == {"--rate": "2", "--shared": None, "--widths": "1,2"}
    assert parser.parse(["--no-shared"]).values == {"learner": {"shared": False}}
    assert parser_of(("learner", schema.settings_of(method))).parse([]).values == {}


def test_ambiguous_flags_are_errors_that_name_both_groups():
    rate = {"rate": schema.settings_of(method)["rate"]}
    parser = parser_of(("learner", rate), ("network", rate))
    assert parser.parse(["--network.rate", "2"]).values == {"network": {"rate": 2.0}}
    with pytest.raises(UsageError, match=r"--rate: several .*; give --learner\.rate or --network\.rate"):
        parser.parse(["--rate", "2"])
    with pytest.raises(UsageError, match=r"^--network\.rate: got x; it must be a number"):
        parser.parse(["--network.rate", "x"])
    shared = {"shared": schema.settings_of(method)["shared"]}
    switches = parser_of(("learner", shared), ("network", shared))
    with pytest.raises(
        UsageError, match=r"--no-shared: .*; give --no-learner\.shared or --no-network\.shared"
    ):
        switches.parse(["--no-shared"])
    assert switches.parse(["--no-network.shared"]).values == {"network": {"shared": False}}


def test_flags_of_other_libraries_give_hints():
    def train(*, steps: int = 1, outer_lr: float = 0.1, inner_lr: float = 0.1, meta_batch: int = 4): ...

    parser = parser_of(("training", schema.settings_of(train)))
    for flag, suggestion in (
        ("--lr", "--outer-lr or --inner-lr"),
        ("--epochs", "--steps"),
        ("--batch-size", "--meta-batch"),
        ("--batch_size", "--meta-batch"),
    ):
        with pytest.raises(
            UsageError, match=f"train has no {flag.replace('_', '-')}; here it is {suggestion}"
        ):
            parser.parse([flag, "3"])
    with pytest.raises(UsageError, match="did you mean --meta-batch"):
        parser.parse(["--meta-batchs", "3"])
    with pytest.raises(UsageError, match="--context-steps: is a setting of matching, not of this"):
        parser.parse(["--context-steps", "3"])


def test_errors_about_arguments_name_flags():
    parser = parser_of(("learner", schema.settings_of(method)))
    with pytest.raises(UsageError, match=r"^--rate: got -1; it must be at least 0$"), parser.naming_flags():
        raise ArgumentError("rate", "got -1; it must be at least 0")
    with pytest.raises(UsageError, match=r"^--rate, --steps: got"), parser.naming_flags():
        raise ArgumentError("rate, steps", "got")


def test_help_shows_groups_choices_and_values(capsys):
    settings = schema.settings_of(method)
    parser = Parser("train", [Group("learner", "method: this", settings, {"rate": 0.25})])
    with pytest.raises(HelpShown):
        parser.parse(["--help"])
    output = capsys.readouterr().out
    assert "method: this" in output
    assert "--rate X" in output
    assert "step size (default: 0.25)" in output
    assert "{second,first}" in output
    assert "It must not be negative" not in output


def test_a_command_is_described_by_its_function():
    def draw(*runs: str, out: str = "curves.png"):
        """Draw runs.

        Args:
          runs: folders of runs.
          out: path of the figure.
        """

    parser = of_function(draw, "draw")
    parsed = parser.parse(["a", "b", "--out", "c.png"])
    assert parsed.words == ["a", "b"]
    assert parsed.values == {"flags": {"out": "c.png"}}
