"""What can be told of a chat template by reading it."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import Environment, TemplateSyntaxError, nodes


def copies_contents(template: str) -> bool:
    """Whether a template does nothing with messages' contents but write them, for messages of role and content alone.

    Then its text for certain roles is the same but for the contents, and one rendering tells where they go. False
    where that cannot be seen: contents that are trimmed, tested or searched, messages that go elsewhere as a whole,
    and whatever depends on the time.

    Example:
        >>> copies_contents("{% for m in messages %}{{ m.role + m['content'] }}{% endfor %}")
        True
        >>> copies_contents("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
        False
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateSyntaxError, RecursionError):  # a tag that transformers alone knows, or nested too deeply
        return False
    loops = [node for node in tree.find_all(nodes.For) if isinstance(node.iter, nodes.Name)]
    of_messages = {node.target.name for node in loops if _is_name(node.iter, {"messages"})} - {None}  # type: ignore[attr-defined]
    return all(_harmless(path, of_messages) for path in _paths(tree, ()))


Path = tuple[nodes.Node, ...]  # a node and what it is in, the innermost first


def _paths(node: nodes.Node, above: Path) -> Iterator[Path]:
    path = (node, *above)
    yield path
    for child in node.iter_child_nodes():
        yield from _paths(child, path)


def _is_name(node: nodes.Node, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


def _harmless(path: Path, of_messages: set[str]) -> bool:
    node, *above = path
    if isinstance(node, nodes.Name) and node.ctx == "load":
        if node.name == "messages":
            loop = isinstance(above[0], nodes.For) and above[0].iter is node
            return loop or (_looks_up(above[0], node, nodes.Getitem) and _key(above[1]) is not None)
        if node.name in of_messages:
            return _key(above[0]) is not None
        return node.name != "strftime_now"
    if isinstance(node, (nodes.Getitem, nodes.Getattr)) and _key(node) == "content":
        inside = next(i for i, outer in enumerate(above) if not isinstance(outer, (nodes.Add, nodes.Concat)))
        return isinstance(above[inside], nodes.Output)
    return not isinstance(node, (nodes.Assign, nodes.AssignBlock)) or not _is_name(node.target, of_messages)


def _looks_up(node: nodes.Node, base: nodes.Node, kind: type[nodes.Node]) -> bool:
    """Whether a node is a look-up of one item of another: no slice."""
    return isinstance(node, kind) and node.node is base and not isinstance(node.arg, nodes.Slice)  # type: ignore[attr-defined]


def _key(node: nodes.Node) -> str | None:
    """The constant name that a node looks up."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return None
