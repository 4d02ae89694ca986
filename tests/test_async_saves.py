"""``model.sharding.async_save`` on two processes: what is saved is of its step, and a whole checkpoint is there."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from dft_lightning import CausalLMModule
from dft_lightning.checkpoints import whole_problem
from dft_lightning.checkpoints.strategy import _check_savers
from dft_lightning.errors import InputError
from dft_lightning.export.checkpoint import open_checkpoint
from small_runs import TINY_ARITHMETIC, arithmetic_data, run_processes, trainer

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    run_processes("two_async_saves.py", str(folder), timeout=100)
    return folder


@pytest.fixture
def found(folder):
    return torch.load(folder / "out.pt")


def tensors(path):
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in metadata.items()
        if hasattr(each, "size")
    }
    load(state, checkpoint_id=path, no_dist=True)
    return state


def test_what_is_saved_is_of_its_step(folder, found):
    """Bit for bit what is saved by a run that waits, optimizer and all, though the next step has run meanwhile."""
    events = found["meanwhile"]["events"]
    steps = [event for event in events if event[0] == "step"]
    assert [step for _, step, _ in steps] == [1, 2, 3]
    assert steps[1][2] == []  # a step after, the checkpoint is being written
    assert steps[2][2] == ["step=1.ckpt"]
    assert found["meanwhile"]["names"] == found["plain"]["names"] == [f"step={step}.ckpt" for step in (1, 2, 3)]
    for step in (1, 2, 3):
        path = folder / "meanwhile" / f"step={step}.ckpt"
        assert whole_problem(path) is None
        own, plain = tensors(path), tensors(folder / "plain" / f"step={step}.ckpt")
        assert own.keys() == plain.keys()
        assert len(own) > 60
        assert all(torch.equal(own[name], plain[name]) for name in own)
        assert open_checkpoint(path).global_step == step


def test_an_older_one_goes_when_the_newer_one_is_whole(found):
    begun = [names for kind, *rest in found["one"]["events"] if kind == "write begins" for names in rest]
    assert begun == [[], ["step=1.ckpt"], ["step=1.ckpt", "step=2.ckpt"]] or begun[1:] == [
        ["step=1.ckpt"],
        ["step=2.ckpt"],
    ]
    assert found["one"]["names"] == ["step=3.ckpt"]


def test_a_failing_write_is_said_on_every_rank_and_an_older_one_is_whole(folder, found):
    messages = found["failing ranks"]
    assert messages[0] == messages[1]
    assert "step=2.ckpt" in messages[0]
    assert "No space left on device" in messages[0]
    assert found["failing"]["names"] == ["step=1.ckpt"]
    assert whole_problem(folder / "failing" / "step=1.ckpt") is None
    assert found["failing"]["last"].endswith("step=1.ckpt")


def test_what_others_save_is_there_at_once(found):
    """A callback of one's own, along the run and after it."""
    assert found["own"] == [None, None, None]


def test_where_it_cannot_begin_nothing_is_left(found):
    assert "No space left on device" in found["meta"]["problem"]
    assert found["meta"]["names"] == []


def test_several_savers_are_refused(found):
    assert "2 ModelCheckpoints would take each other's names" in found["several"]["problem"]
    with pytest.raises(InputError, match="set ModelCheckpoint's save_last to true"):
        _check_savers([ModelCheckpoint(save_last="link")])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (ModelParallelStrategy(1, 1, save_distributed_checkpoint=False), "set save_distributed_checkpoint: true"),
        (ModelParallelStrategy(1, 1), r"call dft_lightning.checkpoints.keep_whole\(trainer\) first"),
        ("auto", "these options are of ModelParallelStrategy"),
    ],
)
def test_where_nothing_could_be_saved_meanwhile(strategy, message):
    module = CausalLMModule(TINY_ARITHMETIC, sharding={"async_save": True})
    try:
        with pytest.raises(InputError, match=message):
            trainer(devices=1, strategy=strategy).fit(module, datamodule=arithmetic_data(4, batch_size=2))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # which forks would take along
