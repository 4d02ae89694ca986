"""jsonargparse, where it has no option for what this command needs, and how its messages are worded: it has no classes
of errors. Other programs' parsers stay as they are."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser, _common, _typehints


def change_for(kind: type[ArgumentParser], packages: tuple[str, ...]) -> None:
    """Change it for one kind of parser.

    A class that is named anew takes no option of the class before it over: jsonargparse keeps those of the same name,
    so that SGD would get AdamW's weight decay and a focal loss another one's ``gamma``, which no config says.

    A short name that several classes have is that of the first of ``packages`` that has one, instead of an error:
    torch has a ``Muon``, bitsandbytes an ``AdamW`` once it is imported, and Lightning a ``ReduceLROnPlateau``.

    Args:
        kind: the parser's class.
        packages: prefixes of import paths.
    """
    discard, resolve = _typehints.discard_init_args_on_class_path_change, _typehints.resolve_class_path_by_name

    def discard_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
        if not isinstance(_common.parent_parser.get(), kind):
            discard(parser_or_action, prev_val, value)  # type: ignore[no-untyped-call]
        elif prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
            prev_val.pop("init_args")

    def resolve_first(cls: Any, name: str) -> str:
        found = []
        if "." not in name and not isinstance(cls, tuple) and isinstance(_common.parent_parser.get(), kind):
            paths = _typehints.get_all_subclass_paths(cls)
            found = [path for path in paths if path.rpartition(".")[2] == name]
        for package in packages if len(found) > 1 else ():
            if chosen := [path for path in found if path.startswith(f"{package}.")]:
                return chosen[0]
        return resolve(cls, name)

    _typehints.discard_init_args_on_class_path_change = discard_all
    _typehints.resolve_class_path_by_name = resolve_first


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Put back what ``set_parsing_settings`` changes meanwhile; the settings can be set alone."""
    before = dict(_common.parsing_settings)
    try:
        yield
    finally:
        _common.parsing_settings.update(before)


def actions(parser: ArgumentParser, subcommands: bool = False) -> list[Any]:
    """A parser's options as argparse has them, with ``subcommands`` those of its subcommands, too."""
    found: list[Any] = list(parser._actions)
    for action in parser._actions if subcommands else ():
        if isinstance(action.choices, dict):  # of names of subcommands, and their parsers
            found += [each for subparser in action.choices.values() for each in actions(subparser, subcommands)]
    return found


def groups_of(parser: ArgumentParser) -> dict[str, str]:
    """A parser's groups of options by their keys, and what each is."""
    return {key: group.title or "" for key, group in (parser.groups or {}).items()}


def type_of(action: Any) -> Any:
    """The type hint that an option was made from, ``None`` where it was from none."""
    return getattr(action, "_typehint", None)


# -- messages ----------------------------------------------------------------------------------------------------------

# By what they are about, in the order in which they are looked for.
_WORDINGS = {
    "factory": r"Type [^\n]+ expects a function or a callable class: (.*)\. Got value: (.*)",
    "unrecognized": r"unrecognized arguments: (\S+)",
    "group option": r"Group '([^']+)' does not accept option '([^']+)'",
    "subcommand option": r"Subcommand '[^']+' does not accept option '([^']+)'",
    "option of a text": r"Unexpected import path format: (\S+)[\s\S]*NestedArg\(key='([^']+)'",
    "broken config": r"Problems parsing config: (.+)",
    "no mapping": r"Unexpected config: (.*)",
    "option of a class": r"Problem with given class_path '([^']+)':\s*Option '([^']+)' is not accepted",
    "import": r"Problem with given class_path '([^']+)':\s*"
    r"(No module named [^\n]+|module [^\n]+has no attribute[^\n]+)",
    "import not allowed": r"Importing '([^']+)' is not allowed, denied by the '\*' entry",
    "no subclass": r"Import path (\S+) does not correspond to a subclass of (\S+)",
    "unknown class": r"Expected a dot import path string: (\S+)",
    "required": r"the following arguments are required: ([^\n]+)",
    "no file": r"File does not exist: '([^']+)'",
    "unknown command": r"argument subcommand: invalid choice: '([^']*)' \(choose from (.*)\)",
    "no command": r'expected "subcommand" to be one of \{([\w,]+)\}, but it was not provided',
}
# The first text that a message gives as the reason for refusing a class that is named without being made.
_OF_A_FACTORY = {
    "option": r"Option '([^']+)' is not accepted",
    "no subclass": r"Expected '([^']+)' to be a subclass of <class '([^']+)'>",
    "import": r"No module named|module .* has no attribute",
    "no class": r"Dict must include|Expected an import path|Expected '.*' to be a function|'OverloadedName'",
}
_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a path but",
    "Problem with given class_path",
    "Expected a <class 'NoneType'>",
)
_PREFIX = re.compile(r'^[\s-]*(Parser key "[^"]+":)?\s*')


def kind_of(message: str) -> tuple[str, re.Match[str]] | None:
    """What a message is about, and its words for it; ``None`` for one of no known kind."""
    found = ((kind, re.search(pattern, message, re.DOTALL)) for kind, pattern in _WORDINGS.items())
    return next(((kind, match) for kind, match in found if match), None)


def constructor_problem(message: str) -> tuple[str, str] | None:
    """What a constructor has raised, where a message says beside it what else the option would have taken: the class by
    its path (empty where the message does not say), and the reason."""
    if not message.startswith("Does not validate against any of the Union subtypes"):
        return None
    found = re.search(
        r"Problem with given class_path '([^']+)':\s+(.+?)(?:\n\s*- |\nGiven value|\Z)", message, re.DOTALL
    )
    return (found[1], " ".join(found[2].split())) if found else ("", reasons_of(message)[0])


def kind_of_factory(reason: str) -> tuple[str, re.Match[str]] | None:
    """What is wrong with a class that is named without being made, as :func:`kind_of` has it for whole messages."""
    found = ((kind, re.match(pattern, reason)) for kind, pattern in _OF_A_FACTORY.items())
    return next(((kind, match) for kind, match in found if match), None)


def factory_named(value: str) -> str | None:
    """The class path in the value of such a message."""
    named = re.match(r"Namespace\(class_path='([^']+)'", value)
    return named and named.group(1)


def without_class_advice(reason: str) -> str:
    """A reason without what would be right as a class: an lr may be a tensor to torch, which no config can say."""
    return re.sub(r"\n[ -]*Expected a dot import path string: [^\n]*", "", reason)


def keys_of(message: str) -> list[str]:
    """The keys that a message is about, an outer one before the one in it."""
    return re.findall(r'Parser key "([^"]+)":', message)


def of_key(key: str, message: str) -> str:
    """A message as one about a key would be."""
    return f'Parser key "{key}":\n  {message}'


def reasons_of(message: str) -> list[str]:
    """A message's lines without wrapping, types in words."""
    lines = [_PREFIX.sub("", line) for line in message.splitlines()]
    return [_plain_types(line) for line in lines if line and not line.startswith(_NOISE)]


def _plain_types(text: str) -> str:
    """``Expected a <class 'float'>`` and ``Expected a typing.Literal[...]`` in words."""
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    return re.sub(r"^Expected an? one of", "expected one of", text).replace("Expected a ", "expected ")
