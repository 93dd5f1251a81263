"""User-defined methods, networks and tasks by the name `module:name`."""

import hashlib
import json
import re
import sys

import pytest
from PIL import Image
from support import read_json

import jaxmeta as jm
from jaxmeta.cli import main
from jaxmeta.cli.config import Chosen, base_of, resolve
from jaxmeta.cli.data import ImageSpec, with_image_settings

METHOD = '''"""A user-defined method."""
import jaxmeta as jm


def cavia(network, *, context: int = 5, rate=0.5, loss=jm.losses.cross_entropy, norm="batch"):
    """Build CAVIA with a setting of another name.

    Args:
      context: number of context parameters.
      rate: step size of the inner loop.
    """
    if context > 50:
        raise ValueError("context must be at most 50")
    return jm.cavia(network, context=context, inner_lr=rate, loss=loss, norm=norm)
'''
NETWORK = '''from flax import linen


class Net(linen.Module):
    """A user-defined network.

    Attributes:
      width: width of the hidden layer.
    """

    out: int
    width: int = 6

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(self.width)(x.reshape(x.shape[0], -1)))
        return linen.Dense(self.out, name="head")(x)
'''
TASKS = '''import numpy as np

import jaxmeta as jm


def my_tasks(split, *, ways: int = 3, shots: int = 1, queries: int = 2, side: int = 8):
    """Draw classes of noise.

    Args:
      ways: classes of a task.
      shots: support images of a class.
      queries: query images of a class.
      side: height and width of the images.
    """
    images = np.random.default_rng(0).integers(0, 256, (60, side, side, 1), np.uint8)
    shape = {"ways": ways, "shots": shots, "queries": queries}
    return jm.tasks.from_arrays(images, np.arange(60) // 5, split=split, classes=(0.5, 0.0, 0.5), **shape)
'''
SMALL = ["--steps", "2", "--meta-batch", "2", "--episodes", "4", "--ways", "3", "--queries", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return the working folder, which has user-defined modules."""
    for name, text in (("my_cavia", METHOD), ("my_net", NETWORK), ("my_source", TASKS)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_cavia", "my_net", "my_source", "my_broken", "my_rows"):
        sys.modules.pop(name, None)


ALL = ["my_cavia:cavia", "--context", "3", "--network", "my_net:Net", "--tasks", "my_source:my_tasks"]


def test_user_defined_method_network_and_tasks_train_evaluate_and_predict(here, capsys):
    assert main(["train", *ALL, *SMALL, "--side", "9", "--width", "4", "--out", "run"]) == 0, (
        capsys.readouterr()
    )
    report, config = read_json("run/report.json"), read_json("run/config.json")
    assert (report["learner"], report["tasks"]) == ("my_cavia:cavia", "my_source:my_tasks")
    assert config["learner"] == {"name": "my_cavia:cavia", "context": 3, "rate": 0.5}
    assert config["network"] == {"name": "my_net:Net", "width": 4}
    assert config["tasks"]["side"] == 9
    assert config["own"]["my_cavia:cavia"] == hashlib.sha256(METHOD.encode()).hexdigest()
    assert "context" in (here / "run" / "report.md").read_text()
    assert 0 <= report["accuracy"]["inductive"]["mean"] <= 1

    # A run folder imports no code by itself: the user names the modules that may be imported.
    capsys.readouterr()
    assert main(["evaluate", "run"]) == 2
    assert "--learner my_cavia:cavia" in capsys.readouterr().err
    with pytest.raises(ValueError, match="code outside of jaxmeta"):
        jm.load_run("run")
    named = ["--learner", "my_cavia:cavia", "--network", "my_net:Net"]
    assert main(["evaluate", "run", *named, "--tasks", "my_source:my_tasks", "--json", "again.json"]) == 0
    assert read_json("again.json")["accuracy"] == report["accuracy"]

    # Code that has changed since gives a warning.
    config["own"]["my_cavia:cavia"] = "0" * 64
    (here / "run" / "config.json").write_text(json.dumps(config))
    main(["evaluate", "run", *named, "--tasks", "my_source:my_tasks", "--episodes", "2"])
    assert "the code of my_cavia:cavia has changed since run was trained" in capsys.readouterr().err

    for part in ("support/one", "support/two", "query"):
        (here / part).mkdir(parents=True)
    for number, part in enumerate(("support/one", "support/two", "query")):
        Image.new("L", (9, 9), 90 * number).save(here / part / "a.png")
    predict = ["predict", "run", "--support", "support", "--query", "query", "--json", "answers.json", *named]
    assert main([*predict, "--tasks", "my_source:my_tasks"]) == 0, capsys.readouterr()
    assert set(read_json("answers.json")[0]["probabilities"]) == {"one", "two"}


def test_loading_a_run_folder_imports_no_code(here, capsys):
    (here / "my_broken.py").write_text("raise SystemExit('imported')\n")
    config = resolve(base_of(Chosen(tasks="sinusoid")), {}).to_json()
    for group, name in (
        ("learner", "my_broken:maml"),
        ("network", "my_broken:Net"),
        ("tasks", "my_broken:f"),
    ):
        untrusted = config | {group: {"name": name}, "own": {}}
        (here / "untrusted").mkdir(exist_ok=True)
        (here / "untrusted" / "config.json").write_text(json.dumps(untrusted))
        assert main(["evaluate", "untrusted"]) == 2
        assert f"was trained with {name}, which is code outside of jaxmeta" in capsys.readouterr().err
        with pytest.raises(ValueError, match="to allow its import, name it"):
            jm.load_run("untrusted")


def test_settings_of_user_defined_tasks_are_not_set_by_the_protocol(here):
    text = TASKS.replace("side: int = 8", "side: int = 8, steps: int = 7, size: int = 1000")
    (here / "my_source.py").write_text(text)
    config = resolve(base_of(Chosen(tasks="my_source:my_tasks")), {})
    assert config.preset is None
    assert (config.tasks["steps"], config.training.steps) == (7, 2000)
    # A setting called `size` need not be the size of images.
    assert with_image_settings(config, ImageSpec(8, 1, 0.5, False)).tasks["size"] == 1000


def test_a_method_declares_its_report_rows(here):
    method = METHOD.replace(
        "import jaxmeta as jm\n", "import jaxmeta as jm\n\n\n@jm.learner(rows={'inductive': 'support'})", 1
    )
    (here / "my_rows.py").write_text(method)
    assert resolve(base_of(Chosen(learner="my_rows:cavia")), {}).training.norm == "support"
    (here / "my_cavia.py").write_text(METHOD.replace(', norm="batch"):', "):").replace(", norm=norm)", ")"))
    config = resolve(base_of(Chosen(learner="my_cavia:cavia")), {})
    assert (config.names().facts.rows, config.training.norm) == ({"inductive": "none"}, "none")


@pytest.mark.nightly
def test_a_user_defined_method_can_be_compared(here, capsys):
    argv = ["compare", "maml", "my_cavia:cavia", "--tasks", "sinusoid", *SMALL[:6]]
    assert main([*argv, "--context", "2", "--out", "both"]) == 0, capsys.readouterr()
    rows = read_json("both/comparison.json")["learners"]
    assert set(rows) == {"maml", "my_cavia:cavia"}
    assert rows["maml"]["left_out"] == ["--context"]


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["my_nowhere:maml"], "LEARNER: got 'my_nowhere:maml', but there is no module 'my_nowhere' in"),
        (
            ["my_cavia:maml"],
            "LEARNER: got 'my_cavia:maml', but .*my_cavia.py has no function 'maml'; it has cavia",
        ),
        (["--network", "my_net:Nett"], "--network: got 'my_net:Nett', but"),
        (["my_cavia:cavia", "--contxt", "3"], "did you mean --context"),
        (["my_cavia:cavia", "--context", "x"], "--context: got x; it must be a whole number"),
        (["my_cavia:cavia", "--context", "99"], r"context must be at most 50 \(.*my_cavia.py, line 13\)"),
        (
            ["my_broken:maml"],
            r"LEARNER: got 'my_broken:maml', but its module has a syntax error: .*\(.*my_broken.py, line 2\)",
        ),
    ],
)
def test_errors_in_user_defined_code_name_file_and_line(here, capsys, argv, pattern):
    (here / "my_broken.py").write_text("import jaxmeta\ndef maml(:\n")
    assert main(["train", *argv, *SMALL]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(pattern, error), error
    assert not (here / "runs").exists()


def test_a_required_parameter_without_a_plain_type_is_an_error(here, capsys):
    (here / "my_broken.py").write_text("def maml(network, *, table: dict): ...\n")
    assert main(["train", "my_broken:maml", *SMALL]) == 2
    assert (
        "table: maml requires it, but it is of type dict, which cannot be a flag" in capsys.readouterr().err
    )
