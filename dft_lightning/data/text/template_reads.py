"""What a chat template reads, told by its source: variables, and words that it looks for in contents."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import cast

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

_SEEKING = {
    *("split", "rsplit", "partition", "rpartition", "startswith", "endswith", "replace", "find", "rfind", "index"),
    *("rindex", "count", "removeprefix", "removesuffix"),
}


class _Generation(Extension):
    """The tag ``{% generation %}`` of transformers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@lru_cache(maxsize=8)
def parsed(template: str) -> nodes.Template | None:
    """A template's syntax tree; ``None`` where it has none."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        return environment.parse(template)
    except (TemplateSyntaxError, RecursionError):  # for its rendering to say
        return None


def variables(template: str) -> set[str]:
    """Names of the variables that a template reads and does not set itself.

    Example:
        >>> sorted(variables("{% set x = 1 %}{% for m in messages %}{{ m.role + x + y }}{% endfor %}"))
        ['messages', 'y']
    """
    tree = parsed(template)
    return set() if tree is None else find_undeclared_variables(tree)


def sought(template: str) -> set[str]:
    """Words that a template looks for in texts: tests by ``in``, splits at, replaces and so on.

    Example:
        >>> sought("{{ m.content.split('</think>')[-1] if '</think>' in m.content }}")
        {'</think>'}
    """
    tree = parsed(template)
    if tree is None:
        return set()
    values = {
        node.target.name: node.node
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Const)
    }
    found = (values.get(node.name) if isinstance(node, nodes.Name) else node for node in _looked_for(tree))
    return {node.value.strip() for node in found if isinstance(node, nodes.Const) and isinstance(node.value, str)}


def _looked_for(tree: nodes.Template) -> Iterator[nodes.Node]:
    for compared in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compared.ops):
            yield compared.expr
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEEKING:
            yield from call.args
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name in ("replace", "split"):
            yield from cast("list[nodes.Node]", filtered.args)
