"""Tests of the types and signatures of public functions, as type checkers, editors and `help` show them."""

import dataclasses
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys
import typing

import pytest
from flax import linen

import jaxmeta as jm
from jaxmeta import declare
from jaxmeta.optimization_based.learned_optimizer import LearnedOptimizerSettings
from jaxmeta.optimization_based.settings import HeadOrBodySettings, MamlSettings
from jaxmeta.transfer.discrepancy import MMDSettings
from jaxmeta.transfer.fine_tune import FineTuneSettings
from jaxmeta.transfer.heads import LogisticSettings, RidgeSettings
from jaxmeta.transfer.layouts import LAYOUTS, LayoutName

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "type_checks"
MODULES = {"": jm, "tasks.": jm.tasks, "nn.": jm.nn, "transfer.": jm.transfer}
PUBLIC = {
    f"{prefix}{name}": getattr(module, name)
    for prefix, module in MODULES.items()
    for name in module.__all__
    if callable(getattr(module, name))
}
# Public functions with types that jax does not declare: devices, shapes, and jaxtyping's trees.
PARTLY_UNTYPED = {
    *("evaluate", "evaluate_classes", "evaluate_episodes", "make_mesh", "meta_step", "train"),
    *("transfer.gradient_reversal", "transfer.load_pretrained"),
}


def mypy(*names):
    """Return the lines of the scripts in which mypy finds an error, with the messages."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    # Without configuration, as a user may run mypy. optax has no type annotations.
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--disable-error-code=import-untyped",
    ]
    command += ["--follow-imports=silent", *(str(SCRIPTS / name) for name in names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    matches = re.findall(r"^(\S+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    return {(pathlib.Path(path).name, int(line)): message for path, line, message in matches}


def basedpyright(folder, *names):
    """Return the lines of the scripts in which basedpyright finds an error, with the messages."""
    config = {
        "include": [str(SCRIPTS / name) for name in names],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        # The types of jax.numpy's functions are partly unknown.
        "reportUnknownMemberType": False,
        "reportMissingTypeStubs": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    report = run_basedpyright("--project", str(folder))
    return {
        (pathlib.Path(entry["file"]).name, entry["range"]["start"]["line"] + 1): entry["message"]
        for entry in report["generalDiagnostics"]
    }


def run_basedpyright(*arguments):
    program = shutil.which("basedpyright")
    if program is None:
        pytest.skip("basedpyright is not installed")
    command = [program, "--outputjson", "--pythonpath", sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout)


def wrong_lines():
    lines = (SCRIPTS / "wrong_calls.py").read_text().splitlines()
    return {number: line for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


@pytest.fixture(scope="module", params=["mypy", "basedpyright"])
def errors(request, tmp_path_factory):
    """Return the errors that a type checker reports in the two scripts."""
    scripts = "right_calls.py", "wrong_calls.py"
    if request.param == "mypy":
        return mypy(*scripts)
    return basedpyright(tmp_path_factory.mktemp("basedpyright"), *scripts)


@pytest.mark.nightly
def test_type_checkers_report_no_error_in_a_users_script(errors):
    assert {line: message for line, message in errors.items() if line[0] == "right_calls.py"} == {}


@pytest.mark.nightly
def test_type_checkers_report_exactly_the_wrong_calls(errors):
    lines = {line for name, line in errors if name == "wrong_calls.py"}
    wrong = wrong_lines()
    assert not {wrong[line] for line in wrong.keys() - lines}
    assert not lines - wrong.keys()


@pytest.mark.nightly
def test_type_checkers_know_the_types_of_all_public_names():
    report = run_basedpyright("--verifytypes", "jaxmeta", "--ignoreexternal")["typeCompleteness"]
    known = {symbol["name"]: symbol["isTypeKnown"] for symbol in report["symbols"]}
    unknown = {name for name in PUBLIC if not known.get(f"jaxmeta.{name}", True)}
    assert unknown <= PARTLY_UNTYPED
    assert {"maml", "anil", "tasks.glyphs", "transfer.fine_tune"} <= {
        name.removeprefix("jaxmeta.") for name in known
    }


def test_the_package_contains_py_typed():
    assert (pathlib.Path(jm.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", PUBLIC)
def test_printed_defaults_are_readable(name):
    try:
        signature = inspect.signature(PUBLIC[name])
    except (TypeError, ValueError):
        pytest.skip("it has no signature")
    # Flax gives every module a `parent`, and its own convolution the fields of `jm.nn.Conv`.
    of_flax = inspect.signature(linen.Conv).parameters if name == "nn.Conv" else {"parent"}
    for parameter in signature.parameters.values():
        if parameter.name not in of_flax:
            shown = repr(parameter.default)
            assert not re.search(r"<lambda>|<locals>| object at 0x", shown), f"{parameter.name} = {shown}"


# Functions and the TypedDicts of their keyword-only parameters, which forwarding functions use.
SCHEMAS = [
    (jm.maml, MamlSettings),
    (jm.learned_optimizer, LearnedOptimizerSettings),
    (jm.transfer.fine_tune, FineTuneSettings),
    (jm.transfer.mmd2, MMDSettings),
    (jm.transfer.ridge_head, RidgeSettings),
    (jm.transfer.logistic_head, LogisticSettings),
]


@pytest.mark.parametrize(("parent", "settings"), SCHEMAS, ids=lambda value: value.__name__)
def test_typed_settings_match_the_signature(parent, settings):
    parameters = {
        parameter.name: parameter
        for parameter in inspect.signature(parent, eval_str=True).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert typing.get_type_hints(settings) == {
        name: parameter.annotation for name, parameter in parameters.items()
    }
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert settings.__required_keys__ == required


def test_a_factory_has_the_typed_settings_with_the_parents_defaults():
    parameters = inspect.signature(jm.anil).parameters
    assert set(parameters) == {"model", "head", *typing.get_type_hints(HeadOrBodySettings)}
    assert parameters["inner_steps"] == inspect.signature(jm.maml, eval_str=True).parameters["inner_steps"]


def parent(network, *, rate: float = 0.1, steps: int = 1):
    return rate, steps


def forwarding(hint):
    class Settings(typing.TypedDict, total=False):
        rate: hint

    @declare.forwards(parent)
    def child(network, **settings: typing.Unpack[Settings]):
        return parent(network, **settings)

    return child


def test_only_typed_settings_are_forwarded():
    child = forwarding(float)
    assert str(inspect.signature(child)) == "(network, *, rate: float = 0.1)"
    assert child(None, rate=0.2) == (0.2, 1)
    with pytest.raises(TypeError, match=r"child\(\) has no argument 'steps'; it takes rate"):
        child(None, steps=2)


def test_settings_whose_type_differs_from_the_parents_are_refused():
    with pytest.raises(TypeError, match=r"takes Settings, but parent\(\) has 'rate' as <class 'float'>"):
        forwarding(int)


def test_settings_that_the_parent_does_not_have_are_refused():
    class Settings(typing.TypedDict, total=False):
        rates: float

    with pytest.raises(TypeError, match=r"parent\(\) has no keyword-only parameter 'rates'"):

        @declare.forwards(parent)
        def child(network, **settings: typing.Unpack[Settings]): ...


def test_excluded_and_redefined_settings_are_refused():
    class Settings(typing.TypedDict, total=False):
        rate: float

    def child(network, **settings: typing.Unpack[Settings]): ...

    def redefining(network, *, rate: float = 0.2, **settings: typing.Unpack[Settings]): ...

    with pytest.raises(TypeError, match="'rate' is also excluded by without="):
        declare.forwards(parent, without=("rate",))(child)
    with pytest.raises(TypeError, match="'rate' is also excluded by without= or a parameter of its own"):
        declare.forwards(parent)(redefining)


def test_the_signature_of_the_decorator_shows_the_facts():
    parameters = inspect.signature(jm.learner).parameters
    assert set(parameters) == {field.name for field in dataclasses.fields(declare.Facts)}
    assert parameters["rows"].default == {"transductive": "batch", "inductive": "support"}


def test_layout_names_match_the_layouts():
    assert typing.get_args(LayoutName) == tuple(LAYOUTS)


def test_choices_have_literal_types():
    """A parameter whose default is a string has a `Literal` type, unless it is listed here."""
    free = {"head", "name", "protocol", "task_column", "train", "shared", "take", "where", "outer"}
    free |= {"argument", "row", "classes", "task_split", "padding"}
    for name, function in PUBLIC.items():
        if not inspect.isfunction(function):
            continue
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if isinstance(parameter.default, str) and parameter.name not in free:
                kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
                assert str not in kinds, f"{name}: {parameter}"
