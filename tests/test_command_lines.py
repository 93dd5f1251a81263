"""Commands in reports: they parse, and reproduce the run or call of the report."""

import inspect
import shlex

import pytest

from jaxmeta.cli import config, main, parser
from jaxmeta.cli import run as run_of_command
from jaxmeta.cli.command_line import command_of_call, command_of_config, flags_of
from jaxmeta.cli.parser import Group
from jaxmeta.cli.presets import PRESETS
from jaxmeta.cli.schema import Setting
from jaxmeta.cli.target_data import target_settings
from jaxmeta.cli.transfer import rank, transfer


@pytest.fixture
def started(monkeypatch):
    """Return a list to which each new run appends its configuration instead of training."""
    configs = []
    monkeypatch.setattr(run_of_command, "new_run", lambda config, invocation: configs.append(config))
    return configs


def command_for(argv, started):
    """Return the command for the run that `argv` starts, and assert that it starts the same run."""
    assert main(argv) == 0
    command = command_of_config(started[-1])
    words = shlex.split(command)
    assert words[:2] == ["jaxmeta", "train"]
    assert main(words[1:]) == 0
    first, second = started[-2:]
    for group in (*config.GROUPS, "preset"):
        assert getattr(first, group) == getattr(second, group)
    return command


@pytest.mark.parametrize(
    "preset", [name for name, spec in PRESETS.items() if ":" not in str(spec.get("tasks"))]
)
def test_every_preset_is_reproduced_by_its_name(preset, started):
    command = command_for(["train", "--preset", preset], started)
    # The command has only names and no flags, since nothing differs from the protocol.
    words = shlex.split(command)[3:]
    assert set(words[::2]) <= {"--preset", "--tasks", "--network"}
    assert len(words) % 2 == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "jaxmeta train maml"),
        (["--ways", "20"], "jaxmeta train maml --ways 20"),
        (
            ["matching", "--ways", "20", "--train-ways", "5"],
            "jaxmeta train matching --ways 20 --train-ways 5",
        ),
        (["prototypical", "--shots", "3"], "jaxmeta train prototypical --shots 3"),
        (
            ["anil", "--tasks", "sinusoid", "--report-steps", "none"],
            "anil --tasks sinusoid --report-steps none",
        ),
        (["--outer-betas", "0.5,0.9", "--outer-lr", "1e-05"], "--outer-lr 1e-05 --outer-betas 0.5,0.9"),
        (
            ["--schedule", "step", "--decay-every", "3", "--steps", "9"],
            "--steps 9 --schedule step --decay-every 3",
        ),
        (["--network", "mlp", "--training.norm", "support", "--no-network.norm"], "--no-network.norm"),
        (["--diagnose", "--seed", "7", "--clip-norm", "2"], "--clip-norm 2 --diagnose --seed 7"),
        (["--preset", "mann-omniglot", "--clip", "none", "--no-distort"], "--no-distort"),
        (["mann", "--tasks", "glyphs", "--strings", "5,5", "--sequence", "20"], "--strings 5,5"),
        (["lstm_meta_learner", "--steps", "50"], "jaxmeta train lstm_meta_learner --steps 50"),
        (["simple_shot", "--tasks", "omniglot", "--protocol", "maml"], "--protocol maml"),
    ],
)
def test_commands_have_the_flags_that_differ_from_defaults(flags, expected, started):
    assert expected in command_for(["train", *flags], started)


def test_a_folder_and_data_with_spaces_are_quoted(started, tmp_path):
    folder = tmp_path / "my $photos"
    folder.mkdir()
    assert f"'folder:{folder}'" in command_for(["train", "--tasks", f"folder:{folder}"], started)
    command = command_for(["train", "--tasks", "mini_imagenet", "--data", str(folder)], started)
    assert f"--data '{folder}'" in command


def test_commands_name_user_defined_code(started, tmp_path, monkeypatch):
    (tmp_path / "mine_to_repeat.py").write_text(
        "import jaxmeta as jm\n"
        "def method(network, *, inner_lr: float = 0.1, rule: str = 'a', loss=None):\n"
        "    return jm.maml(network, inner_lr=inner_lr)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = command_for(["train", "mine_to_repeat:method", "--rule", "-b c", "--inner-lr", "0.25"], started)
    assert command.startswith("jaxmeta train mine_to_repeat:method ")
    assert "--inner-lr 0.25 '--rule=-b c'" in command


def test_a_configuration_with_a_setting_that_has_no_flag_has_no_command():
    resolved = config.resolve(config.base_of(config.Chosen("maml")), {})
    assert command_of_config(resolved) == "jaxmeta train maml"
    # A setting of another version has no flag.
    assert command_of_config(resolved.replaced(learner={"former": 3})) is None


def test_ambiguous_flags_get_their_group_as_prefix():
    size = {"size": Setting("size", int, 1, "")}
    values = {"a": {"size": 2}, "b": {"rate": -0.5, "on": False}}
    groups = {
        "a": size,
        "b": {**size, "rate": Setting("rate", float, 0.0, ""), "on": Setting("on", bool, True, "")},
    }
    assert flags_of(values, groups) == ["--a.size", "2", "--rate=-0.5", "--no-on"]


READING = {"skip_unreadable": True}


@pytest.mark.parametrize(
    ("function", "words", "settings", "expected"),
    [
        (transfer, ["runs/a b"], {"target": "digits"}, "jaxmeta transfer 'runs/a b' --target digits"),
        (
            transfer,
            ["none"],
            {"target": "folder:x", "network": "conv4", "train": ("head", "body/*"), "reading": READING},
            "--train 'head,body/*' --network conv4 --skip-unreadable",
        ),
        (transfer, ["a"], {"target": "t", "shots": "all", "seed": 3}, "--shots all --seed 3"),
        (rank, ["a", "b"], {"target": "t", "fine_tune": True, "score": "nce"}, "jaxmeta rank a b --target t"),
    ],
)
def test_a_call_is_reproduced_by_its_command(function, words, settings, expected):
    parameters = inspect.signature(function).parameters
    arguments = {name: parameter.default for name, parameter in parameters.items()} | settings
    arguments |= {"sources": tuple(words), "source": words[0], "out": "left out"}
    if function is rank:
        del arguments["out"]
    # Forwarded arguments are in a dictionary.
    inner = {name: arguments.pop(name) for name in ("network", "seed", "shots")}
    group = Group("reading", "target", target_settings("folder:x"), {})
    command = command_of_call(function, {**arguments, "options": inner}, {"reading": group.settings})
    assert expected in command
    parsed = parser.of_function(function, function.__name__, [group]).parse(shlex.split(command)[2:])
    reading = {"reading": parsed.values["reading"]} if "reading" in parsed.values else {}
    assert (parsed.words, {**parsed.values["flags"], **reading}) == (words, settings)
