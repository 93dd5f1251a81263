"""What type checkers, editors and `help` know of the public functions."""

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
# Of these, types that jax itself does not declare to type checkers: devices, shapes, and jaxtyping's trees.
OF_JAX = {
    *("evaluate", "evaluate_episodes", "make_mesh", "meta_step", "train"),
    *("transfer.gradient_reversal", "transfer.load_pretrained"),
}


def mypy(*names):
    """Return the lines of the scripts in which mypy finds an error, with the messages."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    # As a user's who has no configuration. optax has no types of its own, and jaxmeta must do without.
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
    found = re.findall(r"^(\S+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    return {(pathlib.Path(path).name, int(line)): message for path, line, message in found}


def basedpyright(folder, *names):
    """Return the lines of the scripts in which basedpyright finds an error, with the messages."""
    config = {
        "include": [str(SCRIPTS / name) for name in names],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        # jax.numpy's own functions are of partly unknown types.
        "reportUnknownMemberType": False,
        "reportMissingTypeStubs": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    report = run_basedpyright("--project", str(folder))
    return {
        (pathlib.Path(each["file"]).name, each["range"]["start"]["line"] + 1): each["message"]
        for each in report["generalDiagnostics"]
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
    """What a type checker finds in the two scripts."""
    scripts = "right_calls.py", "wrong_calls.py"
    if request.param == "mypy":
        return mypy(*scripts)
    return basedpyright(tmp_path_factory.mktemp("basedpyright"), *scripts)


@pytest.mark.nightly
def test_type_checkers_find_nothing_in_a_users_script(errors):
    assert {place: said for place, said in errors.items() if place[0] == "right_calls.py"} == {}


@pytest.mark.nightly
def test_type_checkers_find_every_wrong_call_and_no_other(errors):
    found = {line for name, line in errors if name == "wrong_calls.py"}
    wrong = wrong_lines()
    assert not {wrong[line] for line in wrong.keys() - found}
    assert not found - wrong.keys()


@pytest.mark.nightly
def test_the_types_of_all_public_names_are_known_to_type_checkers():
    report = run_basedpyright("--verifytypes", "jaxmeta", "--ignoreexternal")["typeCompleteness"]
    known = {each["name"]: each["isTypeKnown"] for each in report["symbols"]}
    unknown = {name for name in PUBLIC if not known.get(f"jaxmeta.{name}", True)}
    assert unknown <= OF_JAX
    assert {"maml", "anil", "tasks.glyphs", "transfer.fine_tune"} <= {
        name.removeprefix("jaxmeta.") for name in known
    }


def test_the_package_says_that_it_is_typed():
    assert (pathlib.Path(jm.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", PUBLIC)
def test_defaults_print_as_what_they_are(name):
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


# What a parent takes by name alone, and the type that says so to those that hand it on.
SCHEMAS = [
    (jm.maml, MamlSettings),
    (jm.learned_optimizer, LearnedOptimizerSettings),
    (jm.transfer.fine_tune, FineTuneSettings),
    (jm.transfer.mmd2, MMDSettings),
    (jm.transfer.ridge_head, RidgeSettings),
    (jm.transfer.logistic_head, LogisticSettings),
]


@pytest.mark.parametrize(("parent", "settings"), SCHEMAS, ids=lambda each: each.__name__)
def test_the_type_of_the_settings_is_the_signature(parent, settings):
    parameters = {
        each.name: each
        for each in inspect.signature(parent, eval_str=True).parameters.values()
        if each.kind is each.KEYWORD_ONLY
    }
    assert typing.get_type_hints(settings) == {name: each.annotation for name, each in parameters.items()}
    needed = {name for name, each in parameters.items() if each.default is each.empty}
    assert settings.__required_keys__ == needed


def test_a_factory_has_the_settings_of_its_type_with_the_parents_defaults():
    found = inspect.signature(jm.anil).parameters
    assert set(found) == {"model", "head", *typing.get_type_hints(HeadOrBodySettings)}
    assert found["inner_steps"] == inspect.signature(jm.maml, eval_str=True).parameters["inner_steps"]


def parent(network, *, rate: float = 0.1, steps: int = 1):
    return rate, steps


def forwarding(hint):
    class Settings(typing.TypedDict, total=False):
        rate: hint

    @declare.forwards(parent)
    def child(network, **settings: typing.Unpack[Settings]):
        return parent(network, **settings)

    return child


def test_only_typed_settings_are_handed_on():
    child = forwarding(float)
    assert str(inspect.signature(child)) == "(network, *, rate: float = 0.1)"
    assert child(None, rate=0.2) == (0.2, 1)
    with pytest.raises(TypeError, match=r"child\(\) has no argument 'steps'; it takes rate"):
        child(None, steps=2)


def test_settings_of_another_type_than_the_parents_are_refused():
    with pytest.raises(TypeError, match=r"takes Settings, but parent\(\) has 'rate' as <class 'float'>"):
        forwarding(int)


def test_settings_that_the_parent_has_not_are_refused():
    class Settings(typing.TypedDict, total=False):
        rates: float

    with pytest.raises(TypeError, match=r"parent\(\) has no keyword-only parameter 'rates'"):

        @declare.forwards(parent)
        def child(network, **settings: typing.Unpack[Settings]): ...


def test_settings_that_are_excluded_or_the_factory_s_own_are_refused():
    class Settings(typing.TypedDict, total=False):
        rate: float

    def child(network, **settings: typing.Unpack[Settings]): ...

    def with_its_own(network, *, rate: float = 0.2, **settings: typing.Unpack[Settings]): ...

    with pytest.raises(TypeError, match="'rate' is also excluded by without="):
        declare.forwards(parent, without=("rate",))(child)
    with pytest.raises(TypeError, match="'rate' is also excluded by without= or a parameter of its own"):
        declare.forwards(parent)(with_its_own)


def test_help_of_the_decorator_shows_the_facts():
    found = inspect.signature(jm.learner).parameters
    assert set(found) == {field.name for field in dataclasses.fields(declare.Facts)}
    assert found["rows"].default == {"transductive": "batch", "inductive": "support"}


def test_the_names_of_layouts_are_those_that_there_are():
    assert typing.get_args(LayoutName) == tuple(LAYOUTS)


def test_the_words_of_a_choice_are_literal():
    """A parameter with a word for its default takes these words alone, or says so here."""
    free = {"head", "name", "protocol", "task_column", "train", "shared", "take", "where", "outer"}
    free |= {"argument", "row", "classes", "task_split", "kernel", "padding"}
    for name, function in PUBLIC.items():
        if not inspect.isfunction(function):
            continue
        for each in inspect.signature(function, eval_str=True).parameters.values():
            if isinstance(each.default, str) and each.name not in free:
                kinds = typing.get_args(each.annotation) or (each.annotation,)
                assert str not in kinds, f"{name}: {each}"
