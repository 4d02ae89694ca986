"""Whether the runs of a comparison will have what they read, before the first of them begins."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from dft_lightning.cli.commands import user_message
from dft_lightning.compare.grid import Run
from dft_lightning.compare.recorder import naming_the_way_out
from dft_lightning.data import InstructionDataModule
from dft_lightning.data.requirements import UnscoredRowsError
from dft_lightning.errors import InputError
from dft_lightning.fit.config import data_of, module_of
from dft_lightning.fit.own_classes import PACKAGE, Classes
from dft_lightning.metrics import ExactMatch


def check_inputs(runs: Sequence[Run], evaluation: dict[str, Any], classes: Classes = PACKAGE) -> None:
    """Read what the runs read, and find the answers that they are scored against. No model is loaded.

    The rows stay in the cache of ``datasets``, where the runs find them. They are read again only for a loss that wants
    something else of them.

    Args:
        runs: of the grid.
        evaluation: the comparison's.
        classes: of the command.

    Raises:
        UnscoredRowsError: a loss reads reference log-probs, which the rows lack.
        InputError: what else would end a run: no such file, a bad row, no tokenizer, an answer in which nothing is
            found, options that contradict each other.
    """
    seen = set()
    for run in runs:
        with _as_one_message():
            module = module_of(run.config, classes)
            wants = getattr(module.loss, "reads_rows", False), getattr(module.loss, "takes_negative_weights", True)
            tested_alone = run.identity.loss is None
            if (tested_alone, wants) in seen:
                continue
            seen.add((tested_alone, wants))
            data = data_of(run.config, classes)
            data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]  # whose loss it asks for
            for stage in ("test",) if tested_alone else ("fit", "test"):
                data.load(stage)
            _check_answers(data, ExactMatch(module.evaluation.extractor), evaluation)


def _check_answers(data: InstructionDataModule, scorer: ExactMatch, evaluation: dict[str, Any]) -> None:
    for split in ("validation", "test", *(["forgetting"] if evaluation["forgetting_answers"] else [])):
        if split in data.splits:
            with naming_the_way_out(split):
                scorer.check(data.answers(split, None if split == "test" else evaluation["limit"]), split)


@contextmanager
def _as_one_message() -> Iterator[None]:
    """What ``fit`` would say, and nothing of how many rows there are: each run's log has that."""
    logging.disable(logging.INFO)
    try:
        yield
    except UnscoredRowsError:
        raise
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        raise InputError(message) from error
    finally:
        logging.disable(logging.NOTSET)
