"""What the documentation site does beside its plugins: RST in docstrings, and pipes in tables.

``mkdocs.yml`` names this file twice, as a hook of MkDocs and as an extension of Griffe, which reads the docstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:py:)?(?:class|meth|func|attr|mod|data|obj|exc):`(~?)([\w.]+)`")
# Griffe knows the section by its plural alone; under the singular the prompts would be taken for quotations.
_EXAMPLE = re.compile(r"^([ \t]*)Example:[ \t]*$", re.MULTILINE)
_CODE = re.compile(r"<code[ >].*?</code>", re.DOTALL)
_TAG_OR_HYPHEN = re.compile(r"<[^>]*>|-+(?:&gt;|[^\s<&-])")
_CELL = re.compile(r"<t[dh][ >].*?</t[dh]>", re.DOTALL)


class Docstrings(griffe.Extension):
    """Sphinx's roles become links where the site documents what they name, and code elsewhere."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(node: griffe.Object) -> None:
    if node.docstring is not None:
        text = _ROLE.sub(lambda role: _link(node, role), node.docstring.value)
        # RST's way of writing a letter right after code.
        node.docstring.value = _EXAMPLE.sub(r"\1Examples:", text).replace("`\\ ", "`")
    for member in node.members.values():
        if isinstance(member, griffe.Object):  # and not what is imported
            _rewrite(member)


def _link(node: griffe.Object, role: re.Match[str]) -> str:
    last_part_alone, name = role.groups()
    shown = name.rpartition(".")[2] if last_part_alone else name
    return f'<autoref optional identifier="{_path(node, name)}">`{shown}`</autoref>'


def _path(node: griffe.Object, name: str) -> str:
    """The dotted path of what a docstring names, seen from where it stands."""
    scope: griffe.Object | None = node
    while scope is not None:
        if scope.is_class and name in scope.all_members:
            return str(scope.all_members[name].canonical_path)
        scope = scope.parent
    try:
        return str(node.resolve(name))
    except griffe.NameResolutionError:
        return name


def on_page_content(html: str, **kwargs: Any) -> str:
    r"""``\|`` within code in a table's cell is a pipe on code hosts; Python-Markdown leaves the backslash.

    And no line of code ends after a hyphen, in the middle of a ``--flag`` or a ``->``.
    """
    html = _CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
    return _CODE.sub(lambda code: _TAG_OR_HYPHEN.sub(_held_together, code[0]), html)


def _held_together(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith("<") else f'<span class="held">{found[0]}</span>'
