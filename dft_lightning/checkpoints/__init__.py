"""Checkpoints that are whole or not there: how they are written, recognised and found again."""

from dft_lightning.checkpoints.io import WholeCheckpointIO
from dft_lightning.checkpoints.resolve import checkpoint_folders, newest_saved, resolve_checkpoint
from dft_lightning.checkpoints.strategy import SavesWhole, keep_whole, refused_write
from dft_lightning.checkpoints.whole import newest_whole, whole_problem
from dft_lightning.foreign.lightning import WholeAsyncCheckpointIO

__all__ = [
    "SavesWhole",
    "WholeAsyncCheckpointIO",
    "WholeCheckpointIO",
    "checkpoint_folders",
    "keep_whole",
    "newest_saved",
    "newest_whole",
    "refused_write",
    "resolve_checkpoint",
    "whole_problem",
]
