"""The table of model families: a sample of it, made again, and that what makes it finds faults."""

from __future__ import annotations

import json
import os
import time

import peft.tuners.lora  # noqa: F401 (once, and not in every process)
import pytest
import torch
import transformers

import families
import family_checks
from dft_lightning import CrossEntropyLoss
from dft_lightning.errors import InputError

# A decoder, mixtures of experts, recurrent and hybrid ones, windows, chunks, caps, scales, encoders, parts of
# multimodal ones, positions that are learned, relative or none, layers of encoder-decoders, an output layer of its own.
SAMPLE = (
    *("llama", "mixtral", "deepseek_v3", "mamba", "qwen3_next", "mistral", "llama4", "gemma3", "cohere2_moe", "bert"),
    *("bert (is_decoder: true)", "opt", "bloom", "bart", "zamba"),
)


def table():
    return json.loads(families.RESULTS.read_text(encoding="utf-8"))


def test_a_sample_of_the_table():
    made = table()
    if made["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {made['transformers']}, here is {transformers.__version__}")
    found = {
        name: {cell: result["state"] for cell, result in row.items()}
        for name, row in families.run(list(SAMPLE), list(family_checks.CELLS), jobs=1)
    }
    kept = {name: {cell: result["state"] for cell, result in made["families"][name].items()} for name in SAMPLE}
    assert found == kept


def test_the_table_has_every_type_and_the_page_is_of_it():
    made = table()
    if made["transformers"] == transformers.__version__:
        assert list(made["families"]) == families.row_names()
    text = families.PAGE.read_text(encoding="utf-8")
    assert families.page(made, text) == text


def cells_of(monkeypatch, name="llama", **checks):
    monkeypatch.setattr(family_checks, "CELLS", {**family_checks.CELLS, **checks})
    ((found_name, row),) = families.run([name], list(checks))
    assert found_name == name
    return row


def refuse(family):
    raise InputError("no such thing")


def fail(family):
    raise KeyError("documents")


def test_every_end_of_a_check_is_told_apart(monkeypatch):
    monkeypatch.setattr(families, "TIMEOUT", 20)
    row = cells_of(
        monkeypatch,
        right=lambda family: 1e-5,
        differs=lambda family: 2e-4,
        refused=refuse,
        failed=fail,
        dies=lambda family: os._exit(1),
        after=lambda family: 0.0,
    )
    assert {name: cell["state"] for name, cell in row.items()} == {
        "right": "right",
        "differs": "wrong",
        "refused": "refused",
        "failed": "failed",
        "dies": "failed",
        "after": "failed",
    }
    assert row["refused"]["why"] == "no such thing"
    assert row["failed"]["why"].startswith("KeyError: 'documents' (tests/test_families.py:")
    assert row["dies"]["why"] == row["after"]["why"] == "the process died"


def test_a_check_that_hangs_ends(monkeypatch):
    monkeypatch.setattr(families, "TIMEOUT", 3)
    row = cells_of(monkeypatch, hangs=lambda family: time.sleep(60))
    assert row["hangs"] == {"state": "failed", "why": "timeout"}


class OtherLoss(CrossEntropyLoss):
    """In place of DFT, against whose reference it is held."""


def leaking(module, query, key, value, attention_mask, **options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **options)


def breaks(monkeypatch, cell):
    """Break what the cell is to find out."""
    from dft_lightning.models import attention, documents

    monkeypatch.setattr(documents, "check_documents", lambda *args: None)
    if cell in ("padded", "packed", "padding-free", "LoRA"):
        monkeypatch.setattr(family_checks, "DFTLoss", OtherLoss)
    elif cell == "documents":
        monkeypatch.setattr(attention, "_documents_attention", leaking)
    elif cell == "checkpointing":
        monkeypatch.setattr(transformers.LlamaForCausalLM, "gradient_checkpointing_enable", lambda *a, **k: None)
    else:
        generate = family_checks.generate

        def without_mask(model, ids, mask, *args, **options):
            return generate(model, ids, torch.ones_like(mask), *args, **options)

        monkeypatch.setattr(family_checks, "generate", without_mask)


@pytest.mark.parametrize("cell", family_checks.CELLS)
def test_every_check_finds_a_fault(monkeypatch, cell):
    breaks(monkeypatch, cell)
    ((_, row),) = families.run(["llama"], [cell])
    assert row[cell]["state"] == "wrong", row
