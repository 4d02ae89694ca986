"""The parser of the command and of configs, for a trainer, a module and a data module."""

from __future__ import annotations

import functools
from typing import Any, cast

from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer

from dft_lightning.cli.parsers import OneMessage
from dft_lightning.component import Component, class_path, to_plain
from dft_lightning.foreign.jsonargparse import actions
from dft_lightning.modules.optimizers import DEFAULT_OPTIMIZER


class Parser(OneMessage, LightningArgumentParser):
    """As the other parsers of configs; an optimizer's learning rate has to be given."""

    def add_class_arguments(self, class_type: Any, *args: Any, **kwargs: Any) -> Any:
        added = super().add_class_arguments(class_type, *args, **kwargs)
        for action in actions(self):
            if isinstance(action.default, functools.partial):
                self.set_defaults({action.dest: _class_and_options(action.default)})
            elif isinstance(action.default, Component):  # of a group of options: it could not be written to a config
                self.set_defaults({action.dest: to_plain(action.default)})
            if action.dest == "lr" and _is_optimizer(class_type) and class_type is not DEFAULT_OPTIMIZER.func:
                action.required, action.default = True, None
        if class_type is DEFAULT_OPTIMIZER.func:  # by name, too, and after another class
            self.set_defaults(DEFAULT_OPTIMIZER.keywords)
        return added


def _class_and_options(factory: functools.partial[Any]) -> dict[str, Any]:
    """A partial of a class as a config says it: as a default jsonargparse would take it for a function, without
    options to change."""
    return {"class_path": class_path(cast(type, factory.func)), "init_args": dict(factory.keywords)}


def _is_optimizer(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Optimizer)
