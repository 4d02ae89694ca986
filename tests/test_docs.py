"""What the pages of docs/ show: Python runs, commands are accepted, the reference names what there is."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import dft_lightning
from conftest import ROOT
from dft_lightning.cli import COMMANDS
from dft_lightning.cli.commands import run
from dft_lightning.data import InstructionDataModule, RowSource
from dft_lightning.fit.command import cli_options
from dft_lightning.fit.config import _ConfigReader, _Parsed, read_arguments
from dft_lightning.fit.own_classes import PACKAGE, read_classes
from dft_lightning.modules import CausalLMModule

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```" in page.read_text(encoding="utf-8"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of a page, without what comes before the program."""
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    """A page's blocks run in their order, in one namespace, whose classes can be found as a notebook's can."""
    monkeypatch.chdir(tmp_path)
    namespace = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, namespace.__name__, namespace)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), vars(namespace))


WITH_README = [*PAGES, ROOT / "README.md"]
FITS = {" ".join(words[words.index("fit") :]) for page in WITH_README for words in commands(page) if "fit" in words[:4]}
FITS = {arguments for arguments in FITS if "--help" not in arguments and "OUTPUT" not in arguments}

CONFIGS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "yaml"))
    if set(yaml.safe_load(code)) <= {"model", "data", "trainer"}
]


@pytest.fixture(scope="module")
def parser():
    """Made once: it takes longer than what it parses."""
    made = []

    class Keeps(_ConfigReader):
        def parse_arguments(self, parser, args):
            made.append(parser)
            super().parse_arguments(parser, args)

    args = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    with pytest.raises(_Parsed):
        Keeps(CausalLMModule, InstructionDataModule, **cli_options(), args=args)
    return made[0]


@pytest.fixture
def parse(parser, monkeypatch):
    """A parser is built anew for classes of one's own alone."""
    monkeypatch.syspath_prepend(str(ROOT))  # examples.own_loss, as python -m finds it

    def parse(args):
        if any(read_classes(args, PACKAGE)[2].values()):
            return read_arguments(args)
        return parser.parse_args(args)

    return parse


class LowerEmbeddingRate(CausalLMModule):
    def __init__(self, *args, embedding_rate: float = 1e-6, **kwargs):
        super().__init__(*args, **kwargs)


def with_own_config(arguments: str, folder: Path) -> list[str]:
    """The words of a command, with the config that ``init`` has written in a folder."""
    (written,) = blocks(DOCS / "own_rows.md", "yaml")
    (folder / "train.yaml").write_text(written, encoding="utf-8")
    return arguments.replace("train.yaml", str(folder / "train.yaml")).split()


@pytest.mark.parametrize("arguments", sorted(FITS))
def test_fit_commands_are_accepted(arguments, parse, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    parse([word for word in with_own_config(arguments, tmp_path) if word != "--print_config"])


@pytest.mark.parametrize("code", CONFIGS)
def test_configs_are_accepted(code, parse, tmp_path, monkeypatch):
    own = ModuleType("my_package")
    own.Squares = type("Squares", (RowSource,), {"__init__": lambda self, highest: None, "__module__": "my_package"})
    own.LowerEmbeddingRate = LowerEmbeddingRate
    monkeypatch.setitem(sys.modules, "my_package", own)
    config = tmp_path / "config.yaml"
    config.write_text(code, encoding="utf-8")
    parse(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(config)])


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_commands_are_named(name, capsys):
    assert run(name, ["--help"]) == 0
    options = set(re.findall(r"(?m)^  (?:-h, )?(--[a-z]\w+)", capsys.readouterr().out)) - {"--help"}
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8").split(f"## {name}\n")[1].split("\n## ")[0]
    assert options == set(re.findall(r"`(--[a-z][\w-]+)", page))


def test_the_reference_names_what_there_is():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    for path in named:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
        # The site's reader of the sources takes a module for what the package imports from it under the same name.
        assert not (ROOT / path.replace(".", "/")).with_suffix(".py").exists(), path
    last_parts = {path.rpartition(".")[2] for path in named}
    assert set(dft_lightning.__all__) <= last_parts
