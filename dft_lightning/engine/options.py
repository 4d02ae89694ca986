"""Which engine answers prompts, and how it is asked."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, fields
from typing import Literal, get_args
from urllib.parse import urlsplit

from dft_lightning.errors import check_one_of

Kind = Literal["module", "openai"]


@dataclass(frozen=True)
class EngineOptions:
    """Who answers prompts. A key that a server wants is the environment variable ``OPENAI_API_KEY``, never an option.

    Attributes:
        kind: ``"module"`` generates with the model in this process; ``"openai"`` asks a server with the OpenAI
            completions interface: vLLM, SGLang, ``transformers serve``, llama.cpp's and others.
        url: address of a running server, such as ``http://localhost:8000/v1``.
        model: its name on the server; ``None`` takes the only one that the server lists.
        command: starts a server, which is ended after use; ``{folder}`` stands for the exported model, ``{port}`` for a
            free port: ``vllm serve {folder} --port {port}``. No shell reads it.
        merge: of a run with an adapter, give the command the model that it makes of its base; ``False`` gives it the
            folder of the adapter, for a server that has the base.
        concurrency: requests at once; the server makes batches of them.
        timeout: seconds that a request may take.
        retries: how often a request is made again that gets no answer, half an answer or one that asks to wait (408,
            409, 429, 500 and more). The pauses between grow, or are those that the server asks for.
        start_timeout: seconds until a server that was started has to answer.
    """

    kind: Kind = "module"
    url: str | None = None
    model: str | None = None
    command: str | None = None
    merge: bool = True
    concurrency: int = 32
    timeout: float = 300.0
    retries: int = 4
    start_timeout: float = 600.0

    def __post_init__(self) -> None:
        check_one_of("kind", self.kind, get_args(Kind))
        if self.kind == "module":
            self._check_module()
            return
        if (self.url is None) == (self.command is None):
            raise ValueError(
                "model.evaluation.engine: kind openai takes url (of a running server) or command (that starts one)"
                + (", one of them" if self.url is None else ", not both")
            )
        if self.url is not None:
            _check_url(self.url)
        if self.command is not None:
            _check_command(self.command)
        if self.model == "":
            raise ValueError("model must be a name on the server, or null for the only one that it lists")
        for name, value, least in (("concurrency", self.concurrency, 1), ("retries", self.retries, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, seconds in (("timeout", self.timeout), ("start_timeout", self.start_timeout)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, got {seconds}")

    def _check_module(self) -> None:
        given = [f.name for f in fields(self) if f.name != "kind" and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(f"model.evaluation.engine: kind module has no {', '.join(given)}: set kind: openai")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url must be an address such as http://localhost:8000/v1, got {url!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("url holds a user or a password, which configs must not: set OPENAI_API_KEY")


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"command cannot be split into words ({error}): {command!r}") from error
    found = set(re.findall(r"\{\w*\}", " ".join(words)))
    if lacking := [name for name in ("{folder}", "{port}") if name not in found]:
        raise ValueError(f"command must say {' and '.join(lacking)}, as in vllm serve {{folder}} --port {{port}}")
    if others := sorted(found - {"{folder}", "{port}"}):
        raise ValueError(f"command has {', '.join(others)}, and nothing but {{folder}} and {{port}} is filled in")
