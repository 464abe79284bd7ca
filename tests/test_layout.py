"""One way through the house: what may import what, and what an import costs."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import loopdiag

PACKAGE = Path(loopdiag.__file__).parent

# A room may import what stands to its left, and itself. `files`, `html` and `bootstrap` are for all.
ROOMS = (
    *("errors", "files", "html", "bootstrap", "corpus", "model", "trace", "measures", "readouts", "results", "parts"),
    *("diagnosis", "losses", "summary", "scores", "gaincost", "plots", "report", "cli"),
)
# Side rooms use what stands left of gaincost, and only report and cli use them.
SIDE_ROOMS = ("interventions", "probing", "monitor", "sweep")
# Training a family is watched.
BETWEEN_SIDE_ROOMS = {("sweep", "monitor")}
# Beyond the order: summary, scores, gaincost, plots and report work on results, and know no models.
STRANGERS = {(room, "model") for room in ("summary", "scores", "gaincost", "plots", "report")}
# The package's own files: `__init__` only points at the rooms, `__main__` starts the last one.
ENTRANCES = {"": set(ROOMS) | set(SIDE_ROOMS), "__main__": {"cli"}}
# What every room may take from the package itself.
OF_THE_PACKAGE = {"__version__"}

HEAVY = {"torch", "transformers", "transformer_lens", "xarray", "datasets", "scipy", "matplotlib", "numpy"}


def module_names(folder):
    """Dotted name and file of every module, without the `loopdiag.`; packages by their own name."""
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


MODULES = dict(module_names(PACKAGE))


def imports(source, module, is_package):
    """Dotted names of everything of this package that a module imports, wherever in it, without the `loopdiag.`.

    Functions and TYPE_CHECKING blocks count as the rest. `from loopdiag import load` is an import of what `load` is
    from; `importlib.import_module("loopdiag.model")` is one of `model`.
    """
    here = ["loopdiag", *module.split(".")] if module else ["loopdiag"]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = here[: len(here) - node.level + is_package] if node.level else []
            base = ".".join([*up, *(node.module.split(".") if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    ours = {name.removeprefix("loopdiag").removeprefix(".") for name in found if str(name).split(".")[0] == "loopdiag"}
    return {loopdiag._PUBLIC.get(name, name).removeprefix("loopdiag.") for name in ours} - OF_THE_PACKAGE


def may_import(room, other):
    """Whether one room may import another."""
    if room in ENTRANCES:
        return other in ENTRANCES[room]
    if room == other:
        return True
    if (room, other) in STRANGERS or "" in (room, other):
        return False
    if room in SIDE_ROOMS:
        return other in ROOMS[: ROOMS.index("gaincost")] or (room, other) in BETWEEN_SIDE_ROOMS
    if other in SIDE_ROOMS:
        return room in ("report", "cli")
    return other in ROOMS[: ROOMS.index(room)]


def rooms_of(module, file):
    """The room of a module, and the rooms it imports."""
    found = imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    return module.split(".")[0], {name.split(".")[0] for name in found}


# -- one way ------------------------------------------------------------------------------------------


def test_every_module_is_in_a_room():
    """A new room has to be given its place in the order."""
    assert {module.split(".")[0] for module in MODULES} <= {*ROOMS, *SIDE_ROOMS, *ENTRANCES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    """Nothing imports what stands to its right, in functions and for type checkers neither."""
    room, others = rooms_of(module, MODULES[module])
    wrong = sorted(other for other in others if not may_import(room, other))
    assert not wrong, f"loopdiag.{module} may not import {wrong}"


def test_the_decoder_knows_no_family_and_no_file():
    """Within the model room: configuration, layers and decoder stand left of families and files.

    One exception, for the sake of `model.generate(...)` and `model.save(...)`: these two methods of the decoder, and
    nothing else in it, fetch their function from the right, when they are called.
    """
    for module, file in MODULES.items():
        parts = module.split(".")
        if parts[0] == "model" and len(parts) > 1:
            source = file.read_text(encoding="utf-8")
            found = inner_imports(source, module, file.name == "__init__.py")
            if parts[1] == "decoder":
                for method, late in LATE.items():
                    (text,) = methods(source, method)
                    assert inner_imports(textwrap.dedent(text), module, False) == {late}
                    source = source.replace(text, "")
                found = inner_imports(source, module, False)
            assert found <= OF_THE_DECODER if parts[1] == "decoder" else found <= left_of(parts[1]), module


INNER = (
    *("config", "cache", "dtypes", "states", "layers", "wiring", "past", "exit_gate", "decoder", "facts"),
    *("parallel", "generation", "decoding", "placement", "checkpoints", "saving", "loading"),
)
# Of what stands to its left the decoder needs no dtypes: those are for files.
OF_THE_DECODER = {"config", "cache", "layers", "states", "wiring", "past", "exit_gate", "decoder"}
# Methods of the decoder, and the one module to its right that each of them may import.
LATE = {"generate": "generation", "save": "saving"}


def left_of(part):
    """What a module of the model room may import of it: what stands to its left, and itself."""
    return set(INNER[: INNER.index(part) + 1])


def inner_imports(source, module, is_package):
    """Modules of the model room that a module imports."""
    found = imports(source, module, is_package)
    return {name.split(".")[1] for name in found if name.startswith("model.")}


def methods(source, name):
    """The source text of each method of this name, indented as it stands."""
    return [
        ast.get_source_segment(source, node, padded=True)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]


def test_the_checker_sees_every_kind_of_import():
    """The checker is checked: absolute, relative, late, for types, dynamic, and through the package's own names."""
    source = """
import loopdiag.cli, numpy
from loopdiag import __version__, load, plots
from loopdiag.gaincost.curve import gain_cost
from ..trace import record
from .. import errors
from . import neighbour
if TYPE_CHECKING:
    from loopdiag.diagnosis import Diagnosis
def late():
    from loopdiag.readouts import fit_readouts
    importlib.import_module("loopdiag.measures")
"""
    rooms = {name.split(".")[0] for name in imports(source, "sweep.family", False)}
    at_once, later = {"cli", "model", "plots", "gaincost", "trace", "errors", "sweep"}, {"diagnosis", "readouts"}
    assert rooms == at_once | later | {"measures"}
    assert imports("from . import curve", "gaincost", True) == {"gaincost.curve"}
    assert imports("from .curve import x", "gaincost", True) == {"gaincost.curve.x"}
    assert imports("import loopdiag", "trace", False) == {""}


@pytest.mark.parametrize(
    ("room", "other", "allowed"),
    [
        ("readouts", "model", True),
        ("model", "readouts", False),
        ("corpus", "model", False),
        ("gaincost", "diagnosis", True),
        ("gaincost", "model", False),
        ("diagnosis", "gaincost", False),
        ("gaincost", "summary", True),
        ("summary", "gaincost", False),
        ("summary", "model", False),
        ("plots", "gaincost", True),
        ("plots", "model", False),
        ("gaincost", "plots", False),
        ("sweep", "diagnosis", True),
        ("sweep", "gaincost", False),
        ("sweep", "monitor", True),
        ("monitor", "sweep", False),
        ("monitor", "diagnosis", True),
        ("plots", "monitor", False),
        ("gaincost", "sweep", False),
        ("gaincost", "losses", True),
        ("sweep", "losses", True),
        ("losses", "sweep", False),
        ("losses", "gaincost", False),
        ("plots", "sweep", False),
        ("plots", "scores", True),
        ("probing", "scores", True),
        ("scores", "summary", True),
        ("plots", "probing", False),
        ("cli", "probing", True),
        ("cli", "sweep", True),
        ("cli", "model", True),
        ("trace", "", False),
        ("", "cli", True),
        ("__main__", "cli", True),
        ("__main__", "model", False),
    ],
)
def test_the_order(room, other, allowed):
    """The order itself, case by case."""
    assert may_import(room, other) is allowed


# -- light ----------------------------------------------------------------------------------------------


def loaded_by(*arguments):
    """Top-level packages that a fresh interpreter loads, and what it writes to stdout."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}, run.stdout


def test_importing_the_package_is_light():
    """`import loopdiag` waits for nothing heavy, the same as listing what it offers."""
    modules, offered = loaded_by("-c", "import loopdiag; print(*dir(loopdiag))")
    assert "loopdiag" in modules
    assert not modules & HEAVY
    assert set(offered.split()) >= {"load", "diagnose", "recommend", "gain_cost", "plots", "corpus"}


def test_help_is_light():
    """`python -m loopdiag --help` answers without loading what it takes to measure."""
    modules, text = loaded_by("-m", "loopdiag", "--help")
    assert "typer" in modules
    assert not modules & HEAVY
    assert "recommend" in text


def test_public_names_resolve():
    """Each name of `__all__` is there, is the one of its room, and no other name is invented."""
    assert len(loopdiag.__all__) == len(set(loopdiag.__all__))
    for name in loopdiag.__all__:
        value = getattr(loopdiag, name)
        if name in loopdiag._PUBLIC:
            assert (value.__name__, value.__module__.split(".")[0]) == (name, "loopdiag")
    assert dir(loopdiag) == sorted(loopdiag.__all__)
    with pytest.raises(AttributeError, match="module 'loopdiag' has no attribute 'no_such_name'"):
        loopdiag.no_such_name  # noqa: B018
