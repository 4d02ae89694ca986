"""What a server is sent for a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dft_lightning.engine.api import RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.models.generation import GenerationOptions

Extras = Literal["fields", "generation_config", "none"]


@dataclass(frozen=True)
class Form:
    """How a server takes requests.

    Attributes:
        token_ids: prompts as token ids; as text otherwise.
        extras: where it takes what the OpenAI interface has no names for: ``"fields"`` of the request (vLLM, SGLang,
            llama.cpp), ``"generation_config"``, a field with transformers' options as JSON (``transformers serve``), or
            nowhere.
        log_probs: it may be asked for log-probs.
    """

    token_ids: bool
    extras: Extras
    log_probs: bool


# The best first.
FORMS = tuple(
    Form(token_ids, extras, log_probs)
    for log_probs in (True, False)
    for token_ids in (True, False)
    for extras in ("fields", "generation_config", "none")
)


class Requests:
    """Makes requests for prompts to a model.

    Args:
        model: its name on the server.
        tokenizer: of the model.
        stop_token_ids: a completion ends with the first of these.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)

    def request(
        self,
        prompt: Sequence[int],
        generation: GenerationOptions,
        form: Form,
        *,
        seed: int,
        n: int = 1,
        stops: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Arguments of the package's ``completions.create``. All that decides an answer is said: what is left out, a
        server fills in with its own or with what the checkpoint advises.

        Raises:
            RefusedError: the server takes text, and there is none for this prompt.
        """
        sampled = generation.do_sample
        request: dict[str, Any] = {
            "model": self.model,
            "prompt": [int(token) for token in prompt] if form.token_ids else self.text(prompt),
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature if sampled else 0.0,
            "top_p": generation.top_p if sampled else 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "seed": seed,
        }
        if n > 1:
            request["n"] = n
        if form.log_probs:
            request["logprobs"] = 1  # 0 means none to some
        extra = self._extra(generation, form, self.stop_token_ids if stops is None else list(stops))
        return {**request, "extra_body": extra} if extra else request

    def _extra(self, generation: GenerationOptions, form: Form, stops: list[int]) -> dict[str, Any]:
        if form.extras == "fields":
            # -1 is all to every server, 0 not; and each penalty is some server's own.
            top_k = generation.top_k if generation.do_sample and generation.top_k else -1
            neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
            return {"stop_token_ids": stops, "top_k": top_k, **neutral}
        if form.extras == "generation_config":
            pad = self.tokenizer.pad_token_id
            config: dict[str, Any] = {
                "do_sample": generation.do_sample,
                "eos_token_id": stops,
                "pad_token_id": stops[0] if pad is None else pad,
                "repetition_penalty": 1.0,
                "no_repeat_ngram_size": 0,
                "num_beams": 1,
            }
            if generation.do_sample:
                config |= {name: getattr(generation, name) for name in ("temperature", "top_p", "top_k")}
                config |= {"min_p": 0.0, "typical_p": 1.0}
            return {"generation_config": json.dumps(config)}
        return {}

    def text(self, prompt: Sequence[int]) -> str:
        """The text that a server's tokenizer, which puts in special tokens of its own, makes just this prompt of.

        Raises:
            RefusedError: there is none.
        """
        ids = [int(token) for token in prompt]
        for begun in (0, 1):  # with and without a first token that the tokenizer puts in by itself
            text = str(
                self.tokenizer.decode(ids[begun:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
            if self.tokenizer(text, verbose=False)["input_ids"] == ids:
                return text
        raise RefusedError(
            "the server takes text alone, and no text tokenises to this prompt's tokens: ask one that takes token ids, "
            "such as vLLM"
        )
