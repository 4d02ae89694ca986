"""Rows to messages to tokens and labels to batches."""

from dft_lightning.data.arithmetic import ArithmeticRows, arithmetic_tokenizer
from dft_lightning.data.datamodule import InstructionDataModule
from dft_lightning.data.mixtures import MixedRows
from dft_lightning.data.sources import HubRows, LocalRows, RowSource

__all__ = [
    "ArithmeticRows",
    "HubRows",
    "InstructionDataModule",
    "LocalRows",
    "MixedRows",
    "RowSource",
    "arithmetic_tokenizer",
]
