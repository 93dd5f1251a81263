"""The layers of the package: each file imports from its own layer and those below."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1] / "jaxmeta"
# From the bottom up.
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
    """Return the modules of jaxmeta that a file imports anywhere, except under `TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inside in ast.walk(node)
    }
    modules = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in modules if name.split(".")[0] == "jaxmeta"}


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_does_not_import_from_a_layer_above(path):
    importer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_of(path):
        imported = name.split(".")[1] if "." in name else None
        if imported not in HEIGHT:
            # `from jaxmeta import maml` imports the whole library, allowed only above it.
            assert importer == "cli", f"{path} imports {name}"
            continue
        assert HEIGHT[imported] <= HEIGHT[importer], f"{path} imports {name}, which is in a higher layer"


def test_importing_the_library_does_not_import_the_command_line():
    program = (
        "import sys, jaxmeta\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] in "
        "('msgspec', 'docstring_parser', 'matplotlib', 'tensorboardX')"
        " or name.startswith('jaxmeta.cli')]\n"
        "assert not loaded, loaded\n"
        "assert jaxmeta.load_run.__module__ == 'jaxmeta.cli.run'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
