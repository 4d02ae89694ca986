"""Rows to messages to tokens and labels to batches."""

from dft_lightning.data.datamodule import InstructionDataModule
from dft_lightning.data.options import BatchOptions, RowForm, RowOptions, StreamOptions, TextOptions
from dft_lightning.data.rows.arithmetic import ArithmeticRows, arithmetic_tokenizer
from dft_lightning.data.rows.mixtures import MixedRows
from dft_lightning.data.rows.sources import HubRows, LocalRows, MemoryRows, RowSource

__all__ = [
    "ArithmeticRows",
    "BatchOptions",
    "HubRows",
    "InstructionDataModule",
    "LocalRows",
    "MemoryRows",
    "MixedRows",
    "RowForm",
    "RowOptions",
    "RowSource",
    "StreamOptions",
    "TextOptions",
    "arithmetic_tokenizer",
]
