"""Keys and losses under the names that other trainers have for them."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig

from dft_lightning.cli import help
from dft_lightning.cli.other_names import KEYS, meant_class, meant_key, meant_option
from dft_lightning.cli.outline import outline
from dft_lightning.losses import LOSSES


def inner(found, key):
    option = help._option(key, found)
    return dict(help._inner(option))


def test_other_names_lead_to_keys_that_there_are():
    found = outline("fit")
    known = {*found.options, *found.groups}
    for keys, names in KEYS.items():
        for key in keys.split(" or "):
            outer, _, option = key.rpartition(".")
            of_peft = outer == "model.peft" and option in {field.name for field in dataclasses.fields(LoraConfig)}
            assert key in known or option in inner(found, outer) or of_peft, key
        for name in names.split():
            assert name == "seed" or name == "weight_decay" or name not in {key.rpartition(".")[2] for key in known}
            assert meant_key(name, known) == keys


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("trainer.lr", "model.optimizer.lr"),
        ("learning-rate", "model.optimizer.lr"),
        ("data.seed", "data.batches.seed"),
        ("model.packing", "data.batches.packing"),
        ("max_length", "data.text.max_length"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("qwertyuiop", None),
    ],
)
def test_the_key_that_was_meant(key, expected):
    assert meant_key(key, outline("fit").options) == expected


def test_losses_under_other_names():
    for name, expected in {
        "dft": "DFTLoss", "ce": "CrossEntropyLoss", "focal": "FocalLoss", "cross_entropy": "CrossEntropyLoss",
        "cross-entropy-loss": "CrossEntropyLoss", "sft": "CrossEntropyLoss", "eaft": "EAFTLoss", "deft": "DEFTLoss",
        "DFT": "DFTLoss", "Focal": "FocalLoss", "focal_loss": "FocalLoss", "DFTLos": "DFTLoss", "xyz": None,
    }.items():  # fmt: skip
        assert meant_class(name, sorted(LOSSES)) == expected, name


def test_options_of_classes_under_other_names():
    assert meant_option("learning_rate", ["lr", "betas"]) == "lr"
    assert meant_option("gama", ["gamma"]) == "gamma"
    assert meant_option("learning_rate", ["gamma"]) is None
