"""The documents' links lead somewhere, and the modules that they run exist."""

import importlib.util
import re

import pytest
from helpers import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
OURS = ("olmoe_jax", "eval", "convert", "benchmarks", "examples", "configs")


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_exist(document):
    text = document.read_text(encoding="utf-8")
    for module in re.findall(r"python -m\s+([\w.]+\w)", text):
        if module.split(".")[0] in OURS and "NAME" not in module:
            assert importlib.util.find_spec(module), module


def test_the_reading_path_is_short():
    """Eight files, 2,000 lines, as docs/reading.md says: who adds there moves something out."""
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    files = re.findall(r"^## \d+\. `([^`]+)`", text, re.MULTILINE)
    assert len(files) == 8
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 2000
