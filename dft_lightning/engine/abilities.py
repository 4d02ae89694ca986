"""What a server can do, found out by asking it: no name of a server decides anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dft_lightning.engine.answers import Reader, Said, prompt_tokens
from dft_lightning.engine.api import Api, RefusedError
from dft_lightning.engine.requests import FORMS, Form, Requests
from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from openai.types import Completion

    from dft_lightning.models.generation import GenerationOptions


@dataclass(frozen=True)
class Abilities:
    """What a server can do.

    Attributes:
        form: how it takes requests.
        several: it gives several samples of a prompt in one answer (``n``), and different ones.
        log_probs: it gives log-probs of the model's own distribution, or of one that is the same with these options.
        stop_token_ids: it takes the tokens that end a completion; otherwise it ends at them by itself.
    """

    form: Form
    several: bool
    log_probs: bool
    stop_token_ids: bool


class Asking:
    """Requests, sent and read.

    Args:
        api: the server.
        requests: makes them.
        reader: reads the answers.
    """

    def __init__(self, api: Api, requests: Requests, reader: Reader) -> None:
        self.api = api
        self.requests = requests
        self.reader = reader

    def ask(
        self,
        prompt: Sequence[int],
        generation: GenerationOptions,
        form: Form,
        *,
        seed: int = 0,
        n: int = 1,
        stops: Sequence[int] | None = None,
        logit_bias: dict[str, int] | None = None,
    ) -> list[Said]:
        """``n`` answers to a prompt.

        Raises:
            RefusedError: the server does not take the request, makes other tokens of the prompt or another number of
                answers; or it takes text, and there is none for the prompt.
            InputError: it does not answer.
        """
        request = self.requests.request(prompt, generation, form, seed=seed, n=n, stops=stops)
        if logit_bias is not None:
            request["logit_bias"] = logit_bias

        def read(completion: Completion) -> list[Said]:
            said = self.reader.read(completion, n)
            # Some count a prompt once for each sample.
            if (counted := prompt_tokens(completion)) not in (None, len(prompt), n * len(prompt)):
                raise RefusedError(
                    f"{self.api.url}: the server counts {counted} tokens in a prompt of {len(prompt)}: its tokenizer "
                    "is another, or puts in other special tokens"
                )
            return said

        return self.api.complete(request, read)


def find_abilities(asking: Asking, prompt: Sequence[int], generation: GenerationOptions) -> Abilities:
    """What the server can do with requests of these options, by a handful of short ones.

    Args:
        asking: the server.
        prompt: any that the model answers.
        generation: the options that answers will be asked for with.

    Raises:
        InputError: it does not do what the options ask for, and would not say so.
    """
    probe = _Probe(asking, prompt, generation)
    takes_stops = probe.takes_stop_token_ids()
    if not takes_stops:
        probe.check_ends()
    several, log_probs = False, bool(probe.greedy.tokens)
    if generation.do_sample:
        hot = probe.sampled()
        probe.check_obeyed()
        several = probe.gives_several()
        log_probs = log_probs and probe.gives_own_log_probs(hot)
    return Abilities(probe.form, several, log_probs, takes_stops)


class _Probe:
    """Short requests with one prompt.

    Attributes:
        form: the best that the server takes.
        greedy: its answer.
    """

    def __init__(self, asking: Asking, prompt: Sequence[int], generation: GenerationOptions) -> None:
        self.asking = asking
        self.prompt = prompt
        self.generation = generation
        self.short = replace(generation, do_sample=False, max_new_tokens=_SHORT)
        self.hot = replace(generation, do_sample=True, temperature=_HOT, top_p=1.0, top_k=0, max_new_tokens=_SHORT)
        self.form, self.greedy = self._find_form()

    @property
    def url(self) -> str:
        return self.asking.api.url

    def _find_form(self) -> tuple[Form, Said]:
        refusals: dict[Form, InputError] = {}
        for form in FORMS:
            try:
                return form, self.asking.ask(self.prompt, self.short, form)[0]
            except RefusedError as error:
                refusals[form] = error
        raise InputError(
            f"{self.url}: the server takes no greedy request (temperature 0) for {self.asking.requests.model}, in "
            f"whatever form; it says to the plainest: {refusals[FORMS[-1]]}"
        )

    def _one(self, generation: GenerationOptions, seed: int = 0) -> Said:
        return self.asking.ask(self.prompt, generation, self.form, seed=seed)[0]

    def takes_stop_token_ids(self) -> bool:
        """Whether an answer ends at the tokens that it has begun with before."""
        if self.form.extras == "none":
            return False
        before = self.greedy.answer
        tokens = self.asking.requests.tokenizer(before.text, add_special_tokens=False)["input_ids"]
        stops = sorted({*self.asking.requests.stop_token_ids, *tokens[:_SHORT]})
        try:
            now = self.asking.ask(self.prompt, self.short, self.form, stops=stops)[0].answer
        except RefusedError:
            return False
        return now.finished and (now.num_tokens < before.num_tokens or not before.finished)

    def check_ends(self) -> None:
        """Whether the server ends answers at our tokens by itself: it does where each, made the likeliest, ends one.

        Raises:
            InputError: it does not, or cannot be asked.
        """
        for token in self.asking.requests.stop_token_ids:
            try:
                said = self.asking.ask(self.prompt, self.short, self.form, logit_bias={str(token): 100})[0].answer
                ends = said.finished and said.num_tokens <= 1
            except RefusedError:
                ends = False
            if not ends:
                name = self.asking.requests.tokenizer.decode([token])
                raise InputError(
                    f"{self.url}: the server takes no stop_token_ids, and does not seem to end an answer at {name!r} "
                    f"(token {token}) by itself: ask one that takes them, such as vLLM"
                )

    def sampled(self) -> Said:
        """An answer at a high temperature.

        Raises:
            InputError: all are the greedy one.
        """
        try:
            said = self._one(self.hot, seed=1)
        except RefusedError:  # some take temperatures up to 2
            self.hot = replace(self.hot, temperature=2.0)
            said = self._one(self.hot, seed=1)
        for seed in range(2, _SEEDS + 2):
            if said.answer.text != self.greedy.answer.text:
                return said
            said = self._one(self.hot, seed=seed)
        raise InputError(
            f"{self.url}: the server gives its greedy answer at temperature {self.hot.temperature:g} with whatever "
            "seed: it does not sample"
        )

    def check_obeyed(self) -> None:
        """Whether top_k and top_p, where they are asked for, make a high temperature greedy that would do so.

        Raises:
            InputError: they do not.
        """
        strict: dict[str, Callable[[], GenerationOptions]] = {
            "top_k": lambda: replace(self.hot, top_k=1, max_new_tokens=_SHORTEST),
            "top_p": lambda: replace(self.hot, top_p=1e-6, max_new_tokens=_SHORTEST),
        }
        asked = {"top_k": self.generation.top_k > 0, "top_p": self.generation.top_p < 1}
        for name, options in strict.items():
            if not asked[name]:
                continue
            # With the same options twice: at another length, an answer may end in half a character.
            greedy = self._one(replace(self.short, max_new_tokens=_SHORTEST)).answer.text
            if any(self._one(options(), seed=seed).answer.text != greedy for seed in (1, 2)):
                raise InputError(f"{self.url}: the server ignores {name}: leave it out, or ask one that takes it")

    def gives_several(self) -> bool:
        """Whether ``n`` samples come in one answer, and are different ones."""
        try:
            said = self.asking.ask(self.prompt, self.hot, self.form, seed=1, n=_SEVERAL)
        except RefusedError:
            return False
        return len({each.answer.text for each in said}) > 1

    def gives_own_log_probs(self, hot: Said) -> bool:
        """Whether log-probs are those of temperature 1, whatever the temperature."""
        options = self.generation
        if (options.temperature, options.top_p, options.top_k) == (1.0, 1.0, 0):
            return True
        likeliest = self.greedy.tokens[0]
        found = hot.likeliest.get(likeliest)
        return found is not None and abs(found - self.greedy.log_probs[0]) < _CLOSE


_SHORT, _SHORTEST = 16, 3
_HOT = 5.0
_SEEDS, _SEVERAL = 3, 3
_CLOSE = 0.05
