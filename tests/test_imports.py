"""Imports of olmoe_jax point up the table of folders in docs/design.md, and in no circle."""

import ast
import graphlib
import re

from helpers import ROOT

PACKAGE = ROOT / "olmoe_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path):
    """The modules of the package that a file imports anywhere, for types alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in MODULES and name != "olmoe_jax")


GRAPH = {name: {*imported(path)} - {name} for name, path in MODULES.items()}


def test_no_two_files_import_each_other():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_every_import_points_up_the_table():
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    place = {
        name: number
        for number, row in enumerate(rows)
        for name in re.findall(r"`(\w+)(?:\.py|/)`", row)
    }
    folders = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] != "_"}
    assert {*place} == folders
    for name, others in GRAPH.items():
        own = name.split(".")[1:2]
        for other in others:
            for folder in own:
                assert place[other.split(".")[1]] <= place[folder], f"{name} imports {other}"
