"""The direction of imports: the library below, the command line above, and no cycle between them."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1] / "jaxmeta"
# From the bottom up. A file imports from its own layer and from those below.
LAYERS = [
    ("core", "checks", "files", "losses", "declare", "paths", "learner_form"),
    ("nn",),
    ("tasks",),
    ("optimization_based", "metric_based", "model_based"),
    ("training",),
    ("transfer",),
    ("cli",),
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imports_of(path):
    """Return the modules of ours that a file imports, wherever in it, but for what only types need."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inside in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "jaxmeta"}


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_no_layer_above_its_own(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_of(path):
        layer = name.split(".")[1] if "." in name else None
        if layer is None or layer not in HEIGHT:
            # `from jaxmeta import maml`, which all that is above the library may.
            assert own == "cli", f"{path} imports {name}"
            continue
        assert HEIGHT[layer] <= HEIGHT[own], f"{path} imports {name}, which lies above it"


def test_importing_the_library_imports_no_command_line():
    program = (
        "import sys, jaxmeta\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] in "
        "('msgspec', 'docstring_parser', 'matplotlib', 'tensorboardX')"
        " or name.startswith('jaxmeta.cli')]\n"
        "assert not loaded, loaded\n"
        "assert jaxmeta.load_run.__module__ == 'jaxmeta.cli.run'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
