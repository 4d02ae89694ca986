"""Prompts in, answers out, by a server with the OpenAI completions interface."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dft_lightning.engine.abilities import Abilities, Asking, find_abilities
from dft_lightning.engine.answers import Answer, Reader, Said
from dft_lightning.engine.api import Api
from dft_lightning.engine.options import EngineOptions
from dft_lightning.engine.requests import Requests
from dft_lightning.errors import InputError, did_you_mean, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.models.generation import GenerationOptions


@dataclass(frozen=True)
class Question:
    """A prompt, and how many answers to it are wanted.

    Attributes:
        key: names it, such as its row's number; with the seed and a sample's number it decides what is random.
        token_ids: of the prompt.
        n: samples.
        seed: of the samples.

    Raises:
        ValueError: no answer is wanted.
    """

    key: Hashable
    token_ids: Sequence[int]
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")


class EngineClient:
    """Asks a server. A context manager, which closes the connections.

    Args:
        options: which server, and how it is asked.
        tokenizer: of the model.
        generation: how answers are generated.
        stop_token_ids: a completion ends with the first of these.
        url: address of the server; that of ``options`` by default.

    Raises:
        InputError: the package openai is missing, or nothing would ever end a completion.
        ValueError: there is no address.
    """

    def __init__(
        self,
        options: EngineOptions,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationOptions,
        stop_token_ids: Sequence[int],
        url: str | None = None,
    ) -> None:
        if not stop_token_ids:
            raise InputError("no token ends a turn or a text, so that no answer would ever be finished")
        if (url := url or options.url) is None:
            raise ValueError("no address: give the url of the server")
        self.options = options
        self.tokenizer = tokenizer
        self.generation = generation
        self.stop_token_ids = list(stop_token_ids)
        self.api = Api(url, options.timeout, options.retries)
        self._asking: Asking | None = None
        self._abilities: Abilities | None = None

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.api.close()

    def check(self, prompt: Sequence[int] | None = None) -> Abilities:
        """Find the model on the server, and what the server can do; once, by a handful of short requests.

        Args:
            prompt: token ids of any prompt that the model has something to say to; a few characters by default.

        Raises:
            InputError: no server, another model, or one that would not do what the options ask for.
        """
        if self._abilities is None:
            model = self._find_model()
            requests = Requests(model, self.tokenizer, self.stop_token_ids)
            self._asking = Asking(self.api, requests, Reader(self.tokenizer, self.stop_token_ids))
            if prompt is None:
                prompt = self.tokenizer("1 + 1 =")["input_ids"]
            self._abilities = find_abilities(self._asking, prompt, self.generation)
        return self._abilities

    def _find_model(self) -> str:
        listed, wanted = self.api.models(), self.options.model
        if not listed:
            raise InputError(f"{self.api.url}: the server lists no model")
        shown = shortened(", ".join(listed), 300)
        if wanted is None and len(listed) > 1:
            raise InputError(f"{self.api.url}: the server lists several models: set engine.model to one of {shown}")
        if wanted is not None and wanted not in listed:
            near = did_you_mean(wanted, listed, f": it lists {shown}")
            raise InputError(f"{self.api.url}: the server has no model {wanted!r}{near}")
        return wanted or listed[0]

    def check_model(
        self,
        prompt: Sequence[int],
        expected: Sequence[int],
        clear: int | None = None,
        log_probs: Sequence[float] | None = None,
        tolerance: float = 0.2,
    ) -> None:
        """Whether the served model is the one that is meant: it goes on with a prompt in the same way.

        Args:
            prompt: token ids.
            expected: what the model that is meant says to it, greedily.
            clear: the first so many of these are the likeliest by far, so that rounding makes no others likelier; all
                by default.
            log_probs: log-probability of each of ``expected``; compared where the server gives some.
            tolerance: how far apart the log-probs of the clear ones may be in the mean, in nats. Half precision and
                quantised caches move them by hundredths.

        Raises:
            InputError: it is another.
            ValueError: nothing is clear.
        """
        clear = len(expected) if clear is None else clear
        if not 0 < clear <= len(expected):
            raise ValueError(f"clear must lie in 1 to {len(expected)}, got {clear}: another prompt may tell more")
        abilities, asking = self._found()
        greedy = replace(self.generation, do_sample=False, max_new_tokens=len(expected))
        said = asking.ask(prompt, greedy, abilities.form)[0]
        wanted = self._shown(expected[:clear])
        # Tokenizers differ in whether a text's first space is shown.
        if not said.answer.text.lstrip().startswith(wanted.lstrip()):
            raise self._another_model(f"says {said.answer.text!r} to a known prompt, where it should say {wanted!r}")
        pairs = list(zip(said.log_probs, log_probs or (), strict=False))[:clear]
        apart = sum(abs(found - own) for found, own in pairs) / max(len(pairs), 1)
        if apart > tolerance:
            raise self._another_model(f"gives a known text log-probs that are {apart:.2g} off in the mean")

    def _another_model(self, what: str) -> InputError:
        assert self._asking is not None
        return InputError(
            f"{self.api.url}: {self._asking.requests.model} is another model than the one that is meant, or served "
            f"otherwise: it {what}"
        )

    def _shown(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to a stop token, without half a character at the end."""
        end = next((i for i, token in enumerate(tokens) if token in self.stop_token_ids), len(tokens))
        return str(self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)).rstrip("\ufffd")

    def _found(self) -> tuple[Abilities, Asking]:
        abilities = self.check()
        assert self._asking is not None
        return abilities, self._asking

    def ask(self, questions: Iterable[Question]) -> Iterator[tuple[Any, list[Answer]]]:
        """Each question's key with its answers, as they come, a bounded number of requests at once.

        Questions are read as they are asked. A question whose answers are there has been given; when one fails no more
        are asked, those under way are given, and the error comes last.

        Raises:
            InputError: the server fails, whatever was tried: says how many questions are answered.
        """
        abilities, asking = self._found()
        parts = _parts(questions, abilities.several)
        with _Workers(self.options.concurrency, lambda part: self._answers(asking, abilities, part)) as workers:
            yield from _collected(workers, parts)

    def _answers(self, asking: Asking, abilities: Abilities, part: _Part) -> list[Answer]:
        question = part.question
        seed = seed_of(question.seed, question.key, part.first)
        try:
            said = asking.ask(question.token_ids, self.generation, abilities.form, seed=seed, n=part.n)
        except InputError as error:
            raise InputError(f"{error}; the prompt was {question.key!r}") from error
        return [_without_foreign_log_probs(each, abilities) for each in said]


def _without_foreign_log_probs(said: Said, abilities: Abilities) -> Answer:
    return said.answer if abilities.log_probs else replace(said.answer, log_prob=None)


def seed_of(seed: int, key: Hashable, sample: int) -> int:
    """A seed for a request, the same whenever it is made again: neighbours have nothing in common. 31 bits, which every
    server takes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key} {sample}".encode()).digest()[:4], "little") >> 1


@dataclass(frozen=True)
class _Part:
    """Some samples of a question: what one request asks for."""

    number: int
    question: Question
    first: int
    n: int


def _parts(questions: Iterable[Question], several: bool) -> Iterator[_Part]:
    for number, question in enumerate(questions):
        size = question.n if several else 1
        for first in range(0, question.n, size):
            yield _Part(number, question, first, size)


class _Workers:
    """Threads that work on one part each, at most so many at once.

    They end with the process, whatever they wait for: no answer that is still to come keeps Ctrl-C waiting.
    """

    def __init__(self, count: int, work: Callable[[_Part], list[Answer]]) -> None:
        self.count = count
        self._work = work
        self._todo: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Part, list[Answer] | BaseException]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for _ in self._threads:
            self._todo.put(None)

    def put(self, part: _Part) -> None:
        """Begin with a part."""
        if len(self._threads) < self.count:
            self._threads.append(threading.Thread(target=self._run, daemon=True))
            self._threads[-1].start()
        self._todo.put(part)

    def get(self) -> tuple[_Part, list[Answer] | BaseException]:
        """Wait for one that is done."""
        return self._done.get()

    def _run(self) -> None:
        while (part := self._todo.get()) is not None:
            try:
                found: list[Answer] | BaseException = self._work(part)
            except BaseException as error:
                found = error
            self._done.put((part, found))


def _collected(workers: _Workers, parts: Iterator[_Part]) -> Iterator[tuple[Any, list[Answer]]]:
    """Questions whose parts are all done, with their answers in the samples' order."""
    samples: dict[int, dict[int, list[Answer]]] = {}
    under_way, answered = 0, 0
    failure: BaseException | None = None
    while True:
        while failure is None and under_way < workers.count and (part := next(parts, None)) is not None:
            workers.put(part)
            under_way += 1
        if not under_way:
            break
        part, found = workers.get()
        under_way -= 1
        if isinstance(found, BaseException):
            failure = failure or found
            continue
        mine = samples.setdefault(part.number, {})
        mine[part.first] = found
        if sum(map(len, mine.values())) == part.question.n:
            answered += 1
            yield part.question.key, [answer for _, each in sorted(samples.pop(part.number).items()) for answer in each]
    if isinstance(failure, InputError):
        raise InputError(f"{failure}; {answered} prompts were answered") from failure
    if failure is not None:
        raise failure
