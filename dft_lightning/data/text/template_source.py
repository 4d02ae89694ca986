"""What can be told of a chat template by reading it: where contents go, and where its marks stand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from jinja2 import nodes

from dft_lightning.data.text.template_reads import parsed

Path = tuple[nodes.Node, ...]  # a node and what it is in, the innermost first

# Of these a template is made whose texts do not depend on contents, if contents are only written.
_KNOWN = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.Scope),
    *(nodes.Break, nodes.Continue, nodes.Name, nodes.NSRef, nodes.Const, nodes.List, nodes.Tuple, nodes.Keyword),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Call, nodes.CondExpr),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg),
    *(nodes.Add, nodes.Sub, nodes.Mod, nodes.Concat),
)
_CALLED = {"raise_exception", "namespace"}
_OF_LOOPS = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}
_OF_KIND = {"defined", "undefined", "none", "string", "mapping"}  # of texts they always say the same


def copies_contents(template: str) -> bool:
    """Whether a template is seen to do nothing with messages' contents but write them once they are in place.

    Then, for messages of role and content alone, its text for certain roles is the same but for the contents, and one
    rendering tells where they go. Only what is known to keep to that passes: contents that stand in what is written,
    alone or between others, and messages of which single items are looked up by name.

    Example:
        >>> copies_contents("{% for m in messages %}{{ m.role + m['content'] }}{% endfor %}")
        True
        >>> copies_contents("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
        False
    """
    tree = parsed(template)
    if tree is None:
        return False
    of_messages = {
        node.target.name
        for node in tree.find_all(nodes.For)
        if _is_name(node.iter, {"messages"}) and isinstance(node.target, nodes.Name)
    }
    return all(_harmless(path, of_messages) for path in _paths(tree, ()))


@lru_cache(maxsize=8)
def has_marks(template: str) -> bool:
    """Whether a template has a ``{% generation %}`` block."""
    return any(_is_mark(node) for node in _all(template))


def marks_in_place(template: str) -> bool:
    """Whether what ``{% generation %}`` blocks write goes straight to the text, in all of them.

    Example:
        >>> marks_in_place("{% if x %}{% generation %}a{% endgeneration %}{% endif %}")
        True
        >>> marks_in_place("{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}")
        False
    """
    tree = parsed(template)
    straight = (nodes.Template, nodes.If, nodes.For, nodes.With)
    return tree is not None and all(
        isinstance(outer, straight) and not getattr(outer, "recursive", False)
        for path in _paths(tree, ())
        if _is_mark(path[0])
        for outer in path[1:]
    )


def _all(template: str) -> Iterator[nodes.Node]:
    tree = parsed(template)
    return iter(()) if tree is None else tree.find_all(nodes.Node)


def _is_mark(node: nodes.Node) -> bool:
    """A block of ``{% autoescape %}`` is a scope, too."""
    return isinstance(node, nodes.Scope) and not any(
        isinstance(inner, nodes.ScopedEvalContextModifier) for inner in node.body
    )


def _paths(node: nodes.Node, above: Path) -> Iterator[Path]:
    path = (node, *above)
    yield path
    for child in node.iter_child_nodes():
        yield from _paths(child, path)


def _is_name(node: nodes.Node, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


def _harmless(path: Path, of_messages: set[str]) -> bool:
    node, *above = path
    if not isinstance(node, _KNOWN) or getattr(node, "recursive", False):
        return False
    if isinstance(node, nodes.Call):
        return _is_name(node.node, _CALLED) and not (node.dyn_args or node.dyn_kwargs)
    if isinstance(node, nodes.Filter):
        return node.name != "random"  # contents are in none
    if isinstance(node, nodes.Name):
        return _harmless_name(node, above, of_messages)
    if isinstance(node, (nodes.Getitem, nodes.Getattr)) and _key(node) == "content":
        inside = next(i for i, outer in enumerate(above) if not isinstance(outer, (nodes.Add, nodes.Concat)))
        outer = above[inside]
        return isinstance(outer, nodes.Output) or (
            inside == 0 and isinstance(outer, nodes.Test) and outer.name in _OF_KIND
        )
    return True


def _harmless_name(node: nodes.Name, above: list[nodes.Node], of_messages: set[str]) -> bool:
    if node.ctx != "load":  # a name that stands for messages stands for nothing else
        loop = isinstance(above[0], nodes.For) and _is_name(above[0].iter, {"messages"})
        return node.name != "messages" and (loop or node.name not in of_messages)
    if node.name == "messages":
        loop = isinstance(above[0], nodes.For) and above[0].iter is node
        return loop or (_looks_up(above[0], node) and _key(above[1]) is not None)
    if node.name in of_messages:
        return _key(above[0]) is not None
    if node.name == "loop":
        return _key(above[0]) in _OF_LOOPS
    return node.name not in ("strftime_now", "self", "caller", "varargs", "kwargs")


def _looks_up(node: nodes.Node, base: nodes.Node) -> bool:
    """Whether a node is a look-up of one item of another: no slice."""
    return isinstance(node, nodes.Getitem) and node.node is base and not isinstance(node.arg, nodes.Slice)


def _key(node: nodes.Node) -> str | None:
    """The constant name that a node looks up."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return None
