"""README.md and docs/: figures as the tables have them, links that lead somewhere, commands."""
import importlib
import re
import runpy
import shlex
import xml.etree.ElementTree
from pathlib import Path

import pytest

import data

ROOT = Path(__file__).resolve().parent.parent
DOCS = {name: (ROOT / name).read_text("utf-8") for name in (
    "README.md", "docs/USE.md", "docs/REPRODUCE.md", "docs/RESULTS.md")}
FIGURES = runpy.run_path(str(ROOT / "docs/draw.py"))["figures"]


def test_the_figures_are_those_of_the_tables():
    text = DOCS["docs/RESULTS.md"]
    drawn = FIGURES(text)
    for name, picture in drawn.items():
        assert (ROOT / "docs/assets" / name).read_text("utf-8") == picture, "run docs/draw.py"
    again = FIGURES(text.replace("| 38.2 |", "| 48.2 |"))
    assert {n for n in drawn if again[n] != drawn[n]} == {"curve.svg"}
    for path in (ROOT / "docs/assets").glob("*.svg"):
        assert xml.etree.ElementTree.parse(path).getroot().get("viewBox").startswith("0 0 800")


def anchors(text):
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", DOCS[name])
    for path, anchor in links:
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text("utf-8")), f"{path}#{anchor}"
    assert links


def commands(text):
    """Every command of a document: [(module, its words)]."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines() + inline:
        for command in line.replace("\n", " ").split("&&"):
            found = re.search(r"(?:python|torchrun)\s.*?(\w+(?=\.py)|-m [\w.]+)(?:\.py)?(.*)",
                              command)
            if found and "pip install" not in command:
                words = shlex.split(re.sub(r"\bS\b", "0", found[2]), comments=True)
                yield found[1].removeprefix("-m "), words


class Parsed(Exception):
    pass


@pytest.mark.parametrize("name", DOCS)
def test_every_command_is_one_that_its_program_takes(name, monkeypatch):
    parse_args = data.Parser.parse_args

    def parse(self, argv=None, namespace=None):
        parse_args(self, argv, namespace)
        raise Parsed

    monkeypatch.setattr(data.Parser, "parse_args", parse)
    found = [(module, words) for module, words in commands(DOCS[name])
             if module not in ("pytest", "http.server", "tiny.control")]    # the last: of old
    for module, words in found:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        if words:                                               # else it is only its name
            with pytest.raises(Parsed):
                importlib.import_module(module).main(words)
    assert len(found) > 5


def test_the_readme_is_for_a_first_visit_and_has_the_command_that_ci_runs():
    assert len(DOCS["README.md"].split()) <= 1200
    pattern = re.search(r"grep -m1 '(.*?)'", (ROOT / ".ci/run").read_text())[1]
    assert re.search(pattern, DOCS["README.md"], re.MULTILINE)
