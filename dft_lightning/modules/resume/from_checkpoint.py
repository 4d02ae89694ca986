"""A module from a checkpoint, by the rules for what a file may have run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from dft_lightning.checkpoints.trust import loading_options
from dft_lightning.component import init_parameters
from dft_lightning.modules.options import GROUPS

if TYPE_CHECKING:
    from typing_extensions import Self


class FromCheckpoint(pl.LightningModule):
    """A module whose ``load_from_checkpoint`` runs no code because a file says so."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        *,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """A module from a checkpoint's weights and options; no code is run because the checkpoint says so.

        Arguments are Lightning's, and ``weights_only=False`` lets the file run any code. ``trust_remote_code`` runs
        code that comes with the model that the checkpoint names; a ``loading.attn_implementation`` that is a kernel on
        the hub has to be given here, too. ``kwargs`` are options over the checkpoint's, of groups in part or in whole.

        Raises:
            InputError: the checkpoint names a class that is neither this package's nor imported already, or a model
                that wants its own code to be run.
        """
        files = (checkpoint_path, hparams_file, weights_only)
        with _over_checkpoint(cls, files, kwargs, trust_remote_code) as options:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **options
            )


@contextmanager
def _over_checkpoint(
    cls: type, files: tuple[Any, Any, bool | None], given: Mapping[str, Any], trust_remote_code: bool
) -> Iterator[dict[str, Any]]:
    """For ``load_from_checkpoint`` of a module: the options that are given, and whether code is trusted.

    ``files`` are the first arguments of :func:`~dft_lightning.checkpoints.trust.loading_options`.
    """
    options = dict(given)
    if "loading" in init_parameters(cls):  # a class of one's own may take no such option
        loading = given.get("loading") or {}
        loading = loading if isinstance(loading, Mapping) else vars(loading)  # the group itself
        options["loading"] = {"trust_remote_code": trust_remote_code, **loading}
    with loading_options(cls, *files, options, GROUPS) as whole:
        yield whole
