"""Checkpoints: whole or not there, whatever ends the process; recognised; found again; full and read-only disks."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from checkpoint_runs import RESUMED
from dft_lightning import CausalLMModule
from dft_lightning.checkpoints import WholeCheckpointIO, keep_whole, newest_whole, resolve_checkpoint, whole_problem
from dft_lightning.checkpoints.whole import META, WRITTEN, checkpoints_below, clear_leftovers, put_back, write_marker
from dft_lightning.errors import InputError
from dft_lightning.files import partial_path, put_in_place, sync_files
from dft_lightning.fit import main
from dft_lightning.foreign.lightning import quiet
from small_runs import TINY_ARITHMETIC, arithmetic_data, run_processes, trainer


def content(step, size=300_000):
    """As Lightning's, with a state that says the step all over."""
    state = {f"model.{n}": torch.full((size,), float(step)) for n in range(4)}
    return {"state_dict": state, "pytorch-lightning_version": "2.6.6", "global_step": step}


def shards(folder, step):
    """As a folder of shards, of which none is read here."""
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(bytes([step]) * 400_000)
    torch.save(content(step, 5), folder / META)


@contextlib.contextmanager
def disk(path, options):
    """A file system of its own; the test is skipped where none can be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def kill_while(action, moments):
    """Do something in forked processes, each killed a random moment after its start."""
    ended = 0
    for moment in moments:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # no test runner in here
            os.write(write, b"x")
            with contextlib.suppress(BaseException):
                action()
            os._exit(0)
        os.read(read, 1)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        ended += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(read)
        os.close(write)
        yield
    assert ended >= len(moments) / 4, "most were done before they were killed"


# -- writing -------------------------------------------------------------------------------------------------------


def shortest(save):
    """Seconds of a save that nothing held up: of a longer one a random moment is mostly after another's end."""
    found = []
    for _ in range(4):
        begun = time.perf_counter()
        save()
        found.append(time.perf_counter() - begun)
    return min(found)


def test_a_kill_leaves_the_older_file_or_the_newer(tmp_path):
    path, io = tmp_path / "last.ckpt", WholeCheckpointIO()
    whole = shortest(lambda: io.save_checkpoint(content(0), path))
    draw = random.Random(0)
    seen = 0
    moments = [draw.random() * whole for _ in range(20)]
    torch.set_num_threads(1)  # threads do not survive a fork
    new = content(1)
    for _ in kill_while(lambda: io.save_checkpoint(new, path), moments):
        assert whole_problem(path) is None
        found = torch.load(path, weights_only=True)
        steps = {value for tensor in found["state_dict"].values() for value in tensor.unique().tolist()}
        assert steps == {float(found["global_step"])}
        seen += len(list(tmp_path.glob(".*.partial")))
        assert list(tmp_path.glob("*.ckpt")) == [path]
    assert seen
    io.save_checkpoint(new, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]  # what the killed ones left is gone


def test_a_kill_leaves_the_older_folder_or_the_newer(tmp_path):
    """The folder may be away until the next start gives it back."""
    path = tmp_path / "last.ckpt"

    def save(step=1):
        clear_leftovers(tmp_path)
        partial = partial_path(path)
        shards(partial, step)
        sync_files(partial)
        write_marker(partial, {"name": path.name})
        put_in_place(partial, path)

    draw, whole = random.Random(1), shortest(lambda: save(2))
    for _ in kill_while(save, [draw.random() * whole for _ in range(20)]):
        put_back(tmp_path)
        assert whole_problem(path) is None
        step = torch.load(path / META, weights_only=True)["global_step"]
        assert {path.joinpath(name).read_bytes()[-1] for name in (".metadata", "__1_0.distcp")} == {step}
    save(3)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_folder_that_cannot_take_its_name_leaves_the_older_one(tmp_path):
    path = tmp_path / "last.ckpt"
    shards(path, 1)
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "none", path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    """Of the older and the newer, both hidden, the newer takes the name; neither does while its process lives."""
    for step, kind in ((1, "old"), (2, "partial")):
        partial = tmp_path / partial_path(tmp_path / "a.ckpt", kind).name.replace(f"-{os.getpid()}-", "-99999999-")
        shards(partial, step)
        write_marker(partial, {"name": "a.ckpt", WRITTEN: step, "global_step": step})
    alive = partial_path(tmp_path / "b.ckpt")
    shutil.copytree(partial, alive)
    write_marker(alive, {"name": "b.ckpt"})
    put_back(tmp_path)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["a.ckpt"]
    assert torch.load(tmp_path / "a.ckpt" / META, weights_only=True)["global_step"] == 2
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", alive.name}
    elsewhere = tmp_path / ".00000000-1-000000000000.partial"  # another machine's, that may be writing it
    elsewhere.write_bytes(b"")
    clear_leftovers(tmp_path)
    assert elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    clear_leftovers(tmp_path)
    assert not elsewhere.exists()


def test_a_checkpoint_is_not_copied_in_memory_and_stays_as_lightning_reads_it(tmp_path, monkeypatch):
    import lightning.fabric.plugins.io.torch_io as torch_io

    monkeypatch.setattr(torch_io, "_atomic_save", lambda *args: pytest.fail("Lightning's own way"))
    WholeCheckpointIO().save_checkpoint(content(3), tmp_path / "new" / "a.ckpt")
    found = TorchCheckpointIO().load_checkpoint(tmp_path / "new" / "a.ckpt", weights_only=True)
    assert set(found) - set(content(3)) == {WRITTEN}
    assert torch.equal(found["state_dict"]["model.0"], torch.full((300_000,), 3.0))
    with pytest.raises(InputError, match="is a folder, and the checkpoint to be written there a file"):
        WholeCheckpointIO().save_checkpoint(content(3), tmp_path / "new")


# -- recognising ---------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_anywhere_is_recognised(tmp_path):
    path, cut = tmp_path / "a.ckpt", tmp_path / "cut.ckpt"
    WholeCheckpointIO().save_checkpoint(content(1, 2000), path)
    whole = path.read_bytes()
    assert whole_problem(path) is None
    draw = random.Random(2)
    lengths = {*range(0, 200, 7), *range(len(whole) - 200, len(whole)), *draw.sample(range(len(whole)), 60)}
    for length in lengths:
        cut.write_bytes(whole[:length])
        assert "is cut short or no checkpoint" in (whole_problem(cut) or ""), length
        if length > len(whole) - 22:  # of which nothing is said that the 76 bytes before do not say
            continue
        cut.write_bytes(whole[:length] + bytes(len(whole) - length))  # as room that was reserved and not filled
        assert "is cut short or no checkpoint" in (whole_problem(cut) or ""), length
    cut.write_bytes(whole[:9000] + whole[9500:])  # a piece of the middle is missing
    assert "is cut short or no checkpoint" in (whole_problem(cut) or "")
    header = whole.index(b"PK\x03\x04", 9000)
    cut.write_bytes(whole[:header] + bytes(64) + whole[header + 64 :])
    assert "nothing is where" in (whole_problem(cut) or "")


def test_a_folder_that_was_cut_is_recognised(tmp_path):
    path = tmp_path / "a.ckpt"
    shards(path, 1)
    assert whole_problem(path) is None  # as Lightning leaves it
    (path / ".metadata").rename(tmp_path / "away")
    assert whole_problem(path) == "is cut short: it lacks .metadata"
    (tmp_path / "away").rename(path / ".metadata")
    write_marker(path, {})
    assert whole_problem(path) is None
    os.truncate(path / "__1_0.distcp", 399_999)
    assert whole_problem(path) == "is cut short: __1_0.distcp has 399999 bytes of 400000"
    (path / "__1_0.distcp").unlink()
    assert whole_problem(path) == "is cut short: it lacks __1_0.distcp"
    os.truncate(path / "complete.json", 20)
    assert whole_problem(path) == "is cut short: its complete.json is"


# -- finding -------------------------------------------------------------------------------------------------------


def test_last_passes_over_cut_ones_and_a_named_one_is_refused(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        WholeCheckpointIO().save_checkpoint(content(step, 5), folder / f"step={step}.ckpt")
    os.truncate(folder / "step=3.ckpt", 500)
    shards(folder / "step=4.ckpt", 4)
    (folder / "step=4.ckpt" / META).unlink()
    run = trainer(default_root_dir=tmp_path, callbacks=[ModelCheckpoint(folder)], enable_checkpointing=True)
    keep_whole(run)
    for choice in ("last", "auto"):
        with pytest.warns(UserWarning, match="passed over") as warned:
            assert resolve_checkpoint(choice, run) == str(folder / "step=2.ckpt")
        words = " ".join(str(each.message) for each in warned)
        assert f"passed over {folder / 'step=3.ckpt'}, which is cut short or no checkpoint" in words
        assert f"passed over {folder / 'step=4.ckpt'}, which is cut short: it lacks meta.pt" in words
    assert run.strategy.resumes_from == str(folder / "step=2.ckpt")
    with pytest.raises(InputError, match=r"cut short.*the newest whole one beside it is .*step=2\.ckpt"):
        resolve_checkpoint(folder / "step=3.ckpt", run)
    shards(folder / "step=5.ckpt", 5)
    with pytest.raises(InputError, match="is a checkpoint in shards, which SingleDeviceStrategy does not read"):
        resolve_checkpoint("last", run)
    shutil.rmtree(folder / "step=5.ckpt")
    for step in (1, 2):
        (folder / f"step={step}.ckpt").unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(InputError, match="last: no whole checkpoint under"),
    ):
        resolve_checkpoint("last", run)


def test_a_folder_means_the_newest_whole_one_below_it(tmp_path):
    for number, step in enumerate((3, 1, 2)):
        folder = tmp_path / "run" / "lightning_logs" / f"version_{number}" / "checkpoints"
        WholeCheckpointIO().save_checkpoint(content(step, 5), folder / f"step={step}.ckpt")
    newest = folder / "step=2.ckpt"
    for given in (tmp_path / "run", folder.parent, folder):
        assert resolve_checkpoint(given, trainer()) == str(newest)
    os.truncate(newest, 500)
    with pytest.warns(UserWarning, match=r"passed over .*step=2\.ckpt, which is cut short"):
        assert resolve_checkpoint(tmp_path / "run", trainer()).endswith("step=1.ckpt")
    with pytest.raises(InputError, match=r"no checkpoint in .*version_2 is whole: .*step=2\.ckpt is cut short"):
        resolve_checkpoint(folder.parent, trainer())


def test_what_a_kill_left_half_renamed_below_a_folder_is_found(tmp_path):
    folder = tmp_path / "run" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    partial = folder / partial_path(folder / "a.ckpt").name.replace(f"-{os.getpid()}-", "-99999999-")
    shards(partial, 2)
    write_marker(partial, {"name": "a.ckpt", WRITTEN: 2, "global_step": 2})
    assert checkpoints_below(tmp_path / "run") == [folder / "a.ckpt"]
    with pytest.raises(InputError, match=r"a\.ckpt is a checkpoint in shards"):  # which this strategy does not read
        resolve_checkpoint(tmp_path / "run", trainer())


def test_copies_are_in_the_order_in_which_they_were_written(tmp_path):
    for step in (1, 2, 3):
        WholeCheckpointIO().save_checkpoint(content(step, 5), tmp_path / f"{step}.ckpt")
    paths = [tmp_path / f"{step}.ckpt" for step in (3, 2, 1)]
    for date, path in enumerate(paths):
        os.utime(path, (10**9 + date, 10**9 + date))  # the oldest was copied last
    assert newest_whole(paths) == (tmp_path / "3.ckpt", {})
    plain = [tmp_path / f"plain{9 - step}.ckpt" for step in (5, 4)]
    for path, step in zip(plain, (5, 4), strict=True):
        torch.save(content(step, 5), path)
        os.utime(path, (2 * 10**9, 2 * 10**9))
    assert newest_whole([*paths, *plain])[0] == plain[0]  # the same date: more steps
    assert newest_whole([]) == (None, {})


# -- strategies and callbacks --------------------------------------------------------------------------------------


def test_keep_whole_extends_what_is_there(tmp_path):
    run = trainer()
    for _ in range(2):
        keep_whole(run)
    assert type(run.strategy).__name__ == "SingleDeviceStrategy"
    assert isinstance(run.strategy, SingleDeviceStrategy)
    assert type(run.strategy).__mro__[2] is SingleDeviceStrategy
    assert type(run.strategy.checkpoint_io) is WholeCheckpointIO
    assert type(pickle.loads(pickle.dumps(run.strategy))) is type(run.strategy)

    class Own(TorchCheckpointIO):
        pass

    own = trainer(plugins=[Own()])
    keep_whole(own)
    assert type(own.strategy.checkpoint_io) is Own
    wrapped = trainer(plugins=[AsyncCheckpointIO()])
    keep_whole(wrapped)
    assert isinstance(wrapped.strategy.checkpoint_io, AsyncCheckpointIO)
    assert type(wrapped.strategy.checkpoint_io.checkpoint_io) is WholeCheckpointIO


def test_a_thread_deletes_the_older_one_after_the_newer_is_written(tmp_path, monkeypatch):
    run = trainer(plugins=[AsyncCheckpointIO()])
    keep_whole(run)
    io = run.strategy.checkpoint_io
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    WholeCheckpointIO().save_checkpoint(content(1, 5), old)
    going = threading.Event()
    io._executor = ThreadPoolExecutor(max_workers=1)
    io._executor.submit(going.wait, 20)
    io.save_checkpoint(content(2, 5), new)
    io.remove_checkpoint(old)
    assert (old.exists(), new.exists()) == (True, False)
    going.set()
    io.teardown()
    assert (old.exists(), new.exists()) == (False, True)
    (tmp_path / "file").write_text("")
    going.clear()
    io._executor = ThreadPoolExecutor(max_workers=1)
    io._executor.submit(going.wait, 20)
    io.save_checkpoint(content(3, 5), tmp_path / "file" / "3.ckpt")
    io.remove_checkpoint(new)
    going.set()
    with pytest.raises(InputError, match="could not be written"):
        io.teardown()
    assert new.exists()


@pytest.mark.parametrize("options", [{"save_top_k": 1}, {"save_top_k": 2, "monitor": "step_of"}, {"save_last": True}])
def test_a_save_that_fails_removes_nothing_and_is_not_noted(tmp_path, monkeypatch, options):
    """Also where ModelCheckpoint has dropped an older one from its list before."""

    class Logs(CausalLMModule):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            self.log("step_of", -float(self.global_step))

    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, **options)
    run = trainer(max_steps=4, max_epochs=9, callbacks=[kept], enable_checkpointing=True)
    keep_whole(run)
    save = torch.save
    removed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def fail(value, file):
        if value["global_step"] == 4:
            removed.append(sorted(path.name for path in tmp_path.glob("*.ckpt")))
            raise OSError(5, "Input/output error")
        save(value, file)

    monkeypatch.setattr(torch, "save", fail)
    module = Logs(TINY_ARITHMETIC)
    with pytest.raises(InputError, match=r"step=4\.ckpt could not be written: Input/output error"):
        run.fit(module, datamodule=arithmetic_data(8, batch_size=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == removed[0]
    noted = [kept.best_model_path, *kept.best_k_models, kept.kth_best_model_path, kept.last_model_path]
    assert kept.best_model_path
    assert all(Path(path).exists() for path in noted if path)
    assert len(kept.best_k_models) == (2 if kept.monitor else 0)
    assert run.strategy.checkpoint_io.remove_checkpoint(kept.best_model_path) is None
    assert not Path(kept.best_model_path).exists()


# -- full and read-only disks --------------------------------------------------------------------------------------


def test_reasons_are_those_of_the_system(tmp_path):
    with disk(tmp_path / "small", "size=1m") as small:
        WholeCheckpointIO().save_checkpoint(content(1, 5), small / "1.ckpt")
        with pytest.raises(InputError) as full:
            WholeCheckpointIO().save_checkpoint(content(2), small / "2.ckpt")
        assert str(full.value).startswith(
            f"the checkpoint {small / '2.ckpt'} could not be written: No space left on device. Earlier checkpoints are "
            f"untouched; the newest whole one is {small / '1.ckpt'}. "
        )
        assert os.listdir(small) == ["1.ckpt"]
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        with pytest.raises(InputError, match="could not be written: Read-only file system"):
            WholeCheckpointIO().save_checkpoint(content(2, 5), small / "2.ckpt")
        with pytest.raises(InputError, match="cannot be deleted: Read-only file system"):
            WholeCheckpointIO().remove_checkpoint(small / "1.ckpt")
        assert whole_problem(small / "1.ckpt") is None


def test_two_processes_end_alike_and_go_on(tmp_path):
    """By DDP, FSDP2 and FSDP1, in one file and in shards, on a disk that fills up; read-only; with one rank failing."""
    with disk(tmp_path / "disk", "size=6m") as small, disk(tmp_path / "read_only", "ro,size=1m"):
        run_processes("checkpoint_runs.py", str(tmp_path), str(small), timeout=280)
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("ddp", "fsdp2 whole", "fsdp2 shards", "fsdp1 shards"):
        folder = small / name.replace(" ", "-")
        message = f"{folder / 'step=3.ckpt'} could not be written: No space left on device. Earlier checkpoints are unt"
        for found in (first[name], second[name]):
            assert message in found["message"], name
            assert f"the newest whole one is {folder / 'step=2.ckpt'}" in found["message"]
            assert found["best"] == str(folder / "step=2.ckpt")
            assert found["files"] == ["step=2.ckpt"], name
            if name in RESUMED:
                assert (found["resumed"], found["problem"]) == (3, None), name
                assert found["sums"][0] == found["sums"][1], name  # with and without the end between
    for found in (first, second):
        assert "below, the folder of trainer.callbacks' ModelCheckpoint: Read-only file system" in found["read-only"]
        assert "processes found different checkpoints (0, 1): keep them in a folder" in found["differ"]
        assert "x.ckpt could not be written: Input/output error" in found["alone"]["io"]
    assert first["alone"]["fault"] == "RuntimeError: another rank has failed: a fault"
    assert second["alone"]["fault"] == "TypeError: a fault"


@pytest.mark.parametrize("room", [0, 6])
def test_logs_on_a_full_disk_end_in_one_message(tmp_path, capfd, room):
    """From the start, and when the loggers have filled what was left."""
    values = {
        "model": {"model": TINY_ARITHMETIC},
        "data": {"train": {"class_path": "ArithmeticRows", "init_args": {"num_rows": 80}}, "batch_size": 1},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
    }
    values["data"]["text"] = {"tokenizer": "asset://arithmetic-base"}
    values["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    with disk(tmp_path / "small", "size=64k") as small:
        values["trainer"]["default_root_dir"] = str(small / "runs")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        (small / "ballast").write_bytes(bytes((16 - room) * 4096))
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert f"error: nothing can be written to {small / 'runs'}" in err
    assert "No space left on device" in err
    assert ("the folder of trainer.logger" in err) == (room == 0)


def test_a_writers_thread_is_silent_about_what_ends_the_run(monkeypatch):
    class _AsyncWriterThread(threading.Thread):  # as TensorBoard's
        pass

    def full():
        raise OSError(28, "No space left on device")

    heard = []
    monkeypatch.setattr(threading, "excepthook", lambda ended: heard.append(type(ended.thread)))
    for _ in range(2):
        quiet()
    for kind in (_AsyncWriterThread, threading.Thread):
        thread = kind(target=full)
        thread.start()
        thread.join()
    assert heard == [threading.Thread]
