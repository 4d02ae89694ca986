"""Shared parts of the tests. Nothing here touches the network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Before anything imports transformers or datasets.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores; read when torch is imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the CUDA kernels on CPU tensors; read when they are defined

if hasattr(os, "register_at_fork"):
    # What a parent left lying may wait, when it is taken away, for threads that were not forked.
    os.register_at_fork(after_in_child=gc.freeze)


def pytest_collection_finish() -> None:
    """What imports and tests are made of is there to the end: to look through it for garbage, again and again, took an
    eighth of the suite's time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries whose own objects are left at the end say so."""
    gc.unfreeze()


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TINY_QWEN2 = {**TINY_LLAMA, "model_type": "qwen2", "tie_word_embeddings": False}


def shared(path: str) -> Path:
    """A real file beside the project, or skip the test with the reason."""
    full = SHARED / path
    if not full.exists():
        pytest.skip(f"{full} is not on this machine")
    return full


def at_hand(path: str = "") -> Path:
    """A tokenizer or model beside the project (or all, for no path), or else a small one of its kind made in code."""
    if not (SHARED / (path or "tokenizers")).exists():
        from stand_ins import stand_ins

        return stand_ins() / path
    return SHARED / path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised rows of the tests go to a folder of this session, never to the user's cache."""
    import sys

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", str(folder))


@pytest.fixture(autouse=True)
def _launches_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer with a strategy of several processes says so in the environment, for good: a command that a later test
    starts would wait for ranks that nobody starts."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DFT_LIGHTNING_STARTED_BY"):
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
