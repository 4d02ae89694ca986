"""The openai package, imported when a server is asked and not before; what goes wrong with it, in words."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dft_lightning.errors import InputError, one_line

if TYPE_CHECKING:
    import openai
    from openai.types import Completion

T = TypeVar("T")


class RefusedError(InputError):
    """The server answers, and does not take this request."""


class HalfAnswerError(Exception):
    """An answer came, and it is not whole."""


class Api:
    """A server's models and completions.

    Args:
        url: its address.
        timeout: seconds that a request may take.
        retries: how often a request is made again.

    Raises:
        InputError: the package is missing.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self._openai = _package()
        self._client = self._openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # servers that want none take any
            timeout=self._openai.Timeout(timeout, connect=min(timeout, 10.0)),
            max_retries=retries,
            # A proxy for the world outside knows nothing of this machine's ports.
            http_client=self._openai.DefaultHttpxClient(trust_env=not _is_this_machine(self.url)),
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def models(self) -> list[str]:
        """Names of the models that the server lists.

        Raises:
            InputError: it does not answer, or not as such a server does.
        """
        try:
            listed = self._answered(lambda: self._client.models.list())
            return [str(model.id) for model in listed.data]
        except (AttributeError, TypeError, HalfAnswerError) as error:
            raise InputError(
                f"{self.url}: no list of models in the answer to {self.url}/models: is it an OpenAI interface?"
            ) from error

    def complete(self, request: dict[str, Any], read: Callable[[Completion], T]) -> T:
        """What ``read`` finds in the answer to a request; it is asked again where that is half an answer.

        Raises:
            RefusedError: the server does not take the request.
            InputError: there is no whole answer.
        """
        pause = _FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            try:
                completion = self._answered(lambda: self._client.completions.create(**request))
                if not isinstance(completion, self._openai.types.Completion):
                    raise HalfAnswerError("an answer that is no completion")
                return read(completion)
            except HalfAnswerError as error:
                if not left:
                    raise InputError(f"{self.url}: {error}, {_times(self.retries)}") from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")

    def _answered(self, call: Callable[[], T]) -> T:
        """What the package makes of an answer; its errors in words, after it has tried again."""
        errors = self._openai
        try:
            return call()
        except errors.APITimeoutError as error:
            raise InputError(
                f"{self.url}: no answer within {self.timeout:g} seconds, {_times(self.retries)}: the server is too "
                "slow: set a longer timeout, or less concurrency"
            ) from error
        except errors.APIConnectionError as error:
            cause = one_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise InputError(
                f"{self.url}: no connection, or one that breaks ({cause}), {_times(self.retries)}: does the server run?"
            ) from error
        except errors.APIStatusError as error:
            raise self._status_error(error) from error
        except errors.APIError as error:
            raise InputError(f"{self.url}: {one_line(error)}") from error
        except ValueError as error:
            raise HalfAnswerError("an answer that is no JSON") from error

    def _status_error(self, error: openai.APIStatusError) -> InputError:
        said, status = one_line(error), error.status_code
        if status in (401, 403):
            return InputError(f"{self.url}: {said}: set OPENAI_API_KEY to the key that the server wants")
        if status == 404:
            return InputError(f"{self.url}: {said}: most servers have the interface at an address that ends in /v1")
        if status in _REFUSALS:
            return RefusedError(f"{self.url}: {said}")
        return InputError(f"{self.url}: {said}, {_times(self.retries)}")


# 500: what servers say that fall over a field.
_REFUSALS = (400, 413, 422, 500, 501)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 8.0


def _package() -> Any:
    try:
        import openai
    except ImportError as error:
        raise InputError("a serving engine is asked by openai: pip install 'dft-lightning[engine]'") from error
    return openai


def _is_this_machine(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _times(retries: int) -> str:
    return f"{retries + 1} times" if retries else "at the only try (retries: 0)"
