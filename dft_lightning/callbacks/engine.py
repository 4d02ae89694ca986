"""Answers of a serving engine in the module's place: by its address, or by a server that is started for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.callbacks.export import export_live
from dft_lightning.distributed.strategies import on_first_rank
from dft_lightning.engine import Answer, EngineClient, Question, Server
from dft_lightning.errors import InputError
from dft_lightning.models.decoding import Known
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.modules.causal_lm import CausalLMModule

LOG = "engine.log"
"""In the run's folder: what a server that was started prints."""

_FEW = 4  # prompts
_KNOWN = 16  # tokens that tell a model
_MARGIN = 0.5  # nats; the sums of other kernels, in half precision, move log-probs by less


class AskedEngine:
    """Asks a server, once it is known to have the module's model.

    Args:
        module: whose model.
        url: the server's address.
    """

    def __init__(self, module: CausalLMModule, url: str) -> None:
        self._module = module
        self._url = url
        self._clients: dict[GenerationOptions, EngineClient] = {}
        self._is_known = False

    def close(self) -> None:
        """Close the connections."""
        while self._clients:
            self._clients.popitem()[1].close()

    def ask(
        self, questions: Sequence[Question], options: GenerationOptions, prompts: Sequence[Sequence[int]]
    ) -> dict[Any, list[Answer]]:
        """The answers to each question by its key. The first call is a collective.

        Args:
            questions: what is asked.
            options: how answers are generated.
            prompts: at least one, of token ids: what the model says to one of the first tells it.

        Raises:
            InputError: no server, one of another model, or one that fails.
        """
        if not questions:
            self._known(prompts)  # of a rank whose rows only make the ranks even: it goes along
            return {}
        return dict(self._client(options, prompts).ask(questions))

    def _client(self, options: GenerationOptions, prompts: Sequence[Sequence[int]]) -> EngineClient:
        if options not in self._clients:
            module = self._module
            client = EngineClient(
                module.evaluation.engine, module.tokenizer, options, module.stop_token_ids, url=self._url
            )
            self._clients[options] = client
            known = self._known(prompts)  # first: a server that fails one rank leaves none in a collective
            client.check(prompts[0])
            self._check_model(client, known)
        return self._clients[options]

    def _known(self, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], Known]]:
        """What the module says to a few prompts; nothing after the first call. Of shards a collective."""
        if self._is_known:
            return []
        self._is_known = True
        few = [list(prompts[i % len(prompts)]) for i in range(_FEW)]  # as many on every rank
        device = self._module.device
        return [(ids, self._module.known_tokens(torch.tensor([ids], device=device), _KNOWN)) for ids in few]

    def _check_model(self, client: EngineClient, known: list[tuple[list[int], Known]]) -> None:
        """By each of the prompts, as far as its likeliest tokens are likeliest by far."""
        clear = [(ids, said, said.clear(_MARGIN)) for ids, said in known]
        for ids, said, tokens in clear:
            if tokens:
                client.check_model(ids, said.tokens, tokens, said.log_probs)
        if clear and not any(tokens for *_, tokens in clear):
            rank_zero_warn(
                f"{_KEY}: whether {self._url} has this model cannot be told by what it says to the first prompts, "
                "where no token is likeliest by far"
            )


_KEY = "model.evaluation.engine"


def check_along_fit(module: CausalLMModule) -> None:
    """Whether the answers along ``fit`` can be of the weights of their moment.

    Raises:
        InputError: they are to come from a server that is running, which has others.
    """
    if module.evaluation.engine.url is not None:
        raise InputError(
            f"{_KEY}.url: a server that is running does not have the weights that fit makes: set {_KEY}.command in its "
            "place, which starts one with these at each evaluation"
        )


def _check(trainer: pl.Trainer, module: CausalLMModule) -> None:
    """Raise ``InputError`` where a server cannot stand in the module's place."""
    options, own = module.evaluation.engine, type(module)
    if trainer.state.fn == TrainerFn.FITTING and trainer.global_step:
        check_along_fit(module)
    for name in ("generate", "generate_tokens"):
        if getattr(own, name) is not getattr(CausalLMModule, name):
            raise InputError(f"{_KEY}: a server does not know {own.__name__}.{name}: set {_KEY}.kind: module")
    if options.command is not None and trainer.num_nodes > 1:
        raise InputError(
            f"{_KEY}.command: a server that is started answers on its own machine, and this run is on "
            f"{trainer.num_nodes}: start one beside it, and set {_KEY}.url"
        )
    longest = max(options.start_timeout, options.timeout * (options.retries + 1))
    if trainer.world_size > 1 and longest >= _PATIENCE:
        rank_zero_warn(
            f"{_KEY}: a rank may wait {longest:.0f} seconds for an answer, and the others give up after {_PATIENCE} "
            "(torch's process groups, unless the strategy says otherwise): lower timeout, retries or start_timeout"
        )


_PATIENCE = 1800


@contextmanager
def served(trainer: pl.Trainer, module: CausalLMModule) -> Iterator[None]:
    """Have an engine answer in a module's place meanwhile, where ``model.evaluation.engine`` says so. A collective.

    A server that is to be started is given the weights as they are now. Within another such block it does nothing.

    Raises:
        InputError: the server cannot be started, or fails.
    """
    options = module.evaluation.engine
    if options.kind == "module" or module.engine is not None:
        yield
        return
    _check(trainer, module)
    with ExitStack() as stack:
        url = options.url or _started(trainer, module, stack)
        engine = AskedEngine(module, url)
        stack.callback(engine.close)
        stack.callback(setattr, module, "engine", None)
        module.engine = engine
        yield


def _started(trainer: pl.Trainer, module: CausalLMModule, stack: ExitStack) -> str:
    """The address of a server that rank 0 starts, and the stack ends."""
    options, command = module.evaluation.engine, module.evaluation.engine.command
    assert command is not None
    run = Path(trainer.log_dir or ".")  # a broadcast: every rank asks
    place: list[str] = []
    if trainer.is_global_zero:
        run.mkdir(parents=True, exist_ok=True)
        _remove_left_ones(run)
        place.append(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".served-{os.getpid()}-", dir=run)))
    folder = Path(trainer.strategy.broadcast(place[0] if place else "")) / "model"
    merge = options.merge and module.record()["adapter"] is not None
    export_live(trainer, module, folder, f"{_KEY}: ", merge=merge)
    started: list[Server] = []

    def start() -> None:
        server = Server(command, folder, run / LOG, options.start_timeout)
        stack.push(server.__exit__)
        started.append(server.__enter__())
        rank_zero_info(f"{_KEY}: {server.url} answers, and prints to {server.log}")

    on_first_rank(trainer, start, _KEY.removesuffix("engine"))  # its messages begin with the rest
    return str(trainer.strategy.broadcast(started[0].url if started else ""))


def _remove_left_ones(run: Path) -> None:
    """Folders of weights that processes which were killed have left in a run's folder."""
    for folder in run.glob(".served-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


class EngineAnswers(Callback):
    """Has the server of ``model.evaluation.engine`` answer in ``test`` and ``predict``. The command adds it."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, CausalLMModule):
            self._stack.enter_context(served(trainer, pl_module))

    def _close(self) -> None:
        self._stack.close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stack.__exit__(type(exception), exception, exception.__traceback__)
        self._stack = ExitStack()
