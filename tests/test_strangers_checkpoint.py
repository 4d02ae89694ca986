"""A checkpoint of a stranger: opened, gone on from and exported without its code, its wishes and its paths."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from lightning.fabric.utilities.load import _lazy_load
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from commands import export
from dft_lightning import CausalLMModule, DFTLoss, FocalLoss, InstructionDataModule
from dft_lightning.checkpoints.shards import ShardReader, check_shards, guard_loading
from dft_lightning.checkpoints.trust import _with_rest
from dft_lightning.errors import InputError
from dft_lightning.fit import main as command
from dft_lightning.fit.command import DFTLightningCLI
from dft_lightning.modules.options import GROUPS
from small_runs import FSDP1OnCPU, arithmetic_data, trainer
from strangers import MODULE, changed, saved, stranger, whole  # noqa: F401 (fixtures)

BY_THE_COMMAND = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
OF_THE_TRAINER = "lightning.pytorch.callbacks.ModelSummary"
ESCAPED = '{class_path: "\\x73trangers_code.Loss"}'  # YAML, whose text has no such name


# -- load_from_checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [{}, BY_THE_COMMAND], ids=["Python", "command"])
@pytest.mark.parametrize("key", ["hyper_parameters", "hparams"])  # the latter of old versions
@pytest.mark.parametrize(
    "wish",
    [
        lambda s: {"loss": s.loss},
        lambda s: {"loss": f"{MODULE}.Loss"},
        lambda s: {"loss": ESCAPED},
        lambda s: {"loss": {"class_path": "dft_lightning.WeightedSumLoss", "init_args": {"losses": [s.loss]}}},
        lambda s: {"evaluation": {"answer_extractor": s.loss}},
        lambda s: {"optimizer": s.loss},
        lambda s: {"schedule": s.process},
        lambda s: {"model": {"model_type": s.process}},
        lambda s: {"peft": {"r": s.process}},
        lambda s: {"loading": {"attn_implementation": "a-stranger/kernel"}},
    ],
    ids=["class", "text", "escaped", "nested", "extractor", "optimizer", "schedule", "model", "peft", "kernel"],
)
def test_classes_that_a_checkpoint_names(whole, stranger, tmp_path, wish, key, maker):  # noqa: F811
    path = changed(changed(whole, tmp_path / "a.ckpt", **maker), tmp_path / "a.ckpt", key, **wish(stranger))
    if key == "hparams":  # which hyper_parameters would go over
        content = torch.load(path, weights_only=True)
        content["hyper_parameters"] = {
            **{k: v for k, v in content["hyper_parameters"].items() if k not in content[key]}
        }
        torch.save(content, path)
    kernel = "kernel" in str(wish(stranger))
    with pytest.raises((InputError, TypeError, ValueError), match="attention code of a-stranger" if kernel else ""):
        CausalLMModule.load_from_checkpoint(path)
    with path.open("rb") as file, pytest.raises((InputError, TypeError, ValueError)):
        CausalLMModule.load_from_checkpoint(file)
    assert not stranger.ran()


def test_a_class_of_the_files_with_options_of_the_callers(whole, stranger, tmp_path):  # noqa: F811
    path = changed(whole, tmp_path / "a.ckpt", optimizer={"class_path": f"{MODULE}.Loss", "init_args": {}})
    with pytest.raises(InputError, match=rf"optimizer: {MODULE}.Loss is not imported because a file names it"):
        CausalLMModule.load_from_checkpoint(path, optimizer={"lr": 0.1})
    path = changed(whole, tmp_path / "a.ckpt", evaluation={"answer_extractor": stranger.loss})
    with pytest.raises(InputError, match=rf"answer_extractor: {MODULE}.Loss is not imported because a file names it"):
        CausalLMModule.load_from_checkpoint(path, evaluation={"generation": {"top_k": 1}})
    assert not stranger.ran()


def test_a_class_is_named_and_taken_when_the_caller_has_it(whole, stranger, tmp_path):  # noqa: F811
    path = changed(whole, tmp_path / "a.ckpt", loss=stranger.loss)
    with pytest.raises(InputError, match=rf"loss: {MODULE}.Loss is not imported because a file names it: import its"):
        CausalLMModule.load_from_checkpoint(path)
    assert isinstance(CausalLMModule.load_from_checkpoint(path, loss=FocalLoss()).loss, FocalLoss)
    assert not stranger.ran()
    __import__(MODULE)
    assert type(CausalLMModule.load_from_checkpoint(path).loss).__module__ == MODULE


@pytest.mark.parametrize("maker", [{}, BY_THE_COMMAND], ids=["Python", "command"])
def test_rows_that_a_checkpoint_names(whole, stranger, tmp_path, maker):  # noqa: F811
    key = "datamodule_hyper_parameters"
    for wish in (stranger.loss, stranger.process, {"mine": stranger.loss}):
        path = changed(whole, tmp_path / "a.ckpt", key, train=wish, **maker)
        with pytest.raises((InputError, ValueError)):
            InstructionDataModule.load_from_checkpoint(path)
    for text in (f"{MODULE}.Loss", ESCAPED):  # a hub name, which is not asked for before there is a run
        with contextlib.suppress(InputError):
            InstructionDataModule.load_from_checkpoint(changed(whole, tmp_path / "a.ckpt", key, train=text, **maker))
    assert not stranger.ran()
    assert InstructionDataModule.load_from_checkpoint(whole).batch_size == 4


def test_options_of_another_file(whole, stranger, tmp_path):  # noqa: F811
    options = torch.load(whole, weights_only=True)["hyper_parameters"]
    file = tmp_path / "hparams.yaml"
    file.write_text(
        yaml.safe_dump({**options, "loading": {**options["loading"], "trust_remote_code": True}, "loss": stranger.loss})
    )
    with pytest.raises(InputError, match=f"{MODULE}.Loss is not imported"):
        CausalLMModule.load_from_checkpoint(whole, hparams_file=file)
    file.write_text(yaml.safe_dump({**options, "loading": {**options["loading"], "trust_remote_code": True}}))
    assert not CausalLMModule.load_from_checkpoint(whole, hparams_file=file).loading.trust_remote_code
    assert not stranger.ran()


def test_pickles(whole, stranger, tmp_path):  # noqa: F811
    torch.save({**torch.load(whole, weights_only=True), "more": stranger.pickle()}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="it holds more than values, (posix|nt).mkdir") as error:
        CausalLMModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert "weights_only" not in str(error.value)  # torch's advice is to open it all the same
    assert export(["--checkpoint", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out")]) == 2
    assert not stranger.ran()
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert stranger.ran()


# -- a base with code of its own -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA checkpoint and its base's folder."""
    from dft_lightning.assets import resolve

    folder = tmp_path_factory.mktemp("adapter")
    shutil.copytree(resolve("asset://arithmetic-base"), folder / "base")
    peft = {"r": 2, "target_modules": ["q_proj"]}
    return saved(CausalLMModule(str(folder / "base"), peft=peft), folder / "adapter.ckpt"), folder / "base"


def with_code(base, target, code, repository=""):
    """The base's folder, as one that needs code of its own."""
    shutil.copytree(base, target)
    (target / "strange.py").write_text(code)
    config = json.loads((target / "config.json").read_text())
    names = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    config |= {"model_type": "strange", "auto_map": {key: repository + name for key, name in names.items()}}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_a_checkpoints_trust_is_not_ours(adapter, whole, stranger, tmp_path, capsys):  # noqa: F811
    base = with_code(adapter[1], tmp_path / "base", stranger.code)
    path = changed(adapter[0], tmp_path / "a.ckpt", loading={"trust_remote_code": True}, model=base)
    path = changed(path, path, "dft_lightning", base=base)
    output = tmp_path / "out"
    assert export(["--checkpoint", str(path), "--output", str(output), "--merge"]) == 2
    message = capsys.readouterr().err
    assert f"{base} wants code of its own to be run (strange.StrangeConfig, strange.StrangeModel)" in message
    assert "--trust_remote_code" in message
    assert len(message.strip().splitlines()) == 1
    for load in (path, changed(whole, tmp_path / "b.ckpt", loading={"trust_remote_code": True}, model=base)):
        with pytest.raises(InputError, match=r"wants code of its own .* load_from_checkpoint: trust_remote_code=True"):
            CausalLMModule.load_from_checkpoint(load)
    assert not stranger.ran()
    assert not output.exists()

    assert export(["--checkpoint", str(path), "--output", str(output), "--merge", "--trust_remote_code"]) == 0
    assert stranger.ran()
    module = CausalLMModule.load_from_checkpoint(path, trust_remote_code=True)
    assert type(module.model).__name__ == "StrangeModel"


def test_code_in_another_repository_is_named(adapter, stranger, tmp_path):  # noqa: F811
    base = with_code(adapter[1], tmp_path / "base", stranger.code, "a-stranger/code--")
    path = changed(adapter[0], tmp_path / "a.ckpt", loading={"trust_remote_code": True}, model=base)
    with pytest.raises(InputError, match=r"run \(a-stranger/code: strange.StrangeConfig"):
        CausalLMModule.load_from_checkpoint(path)


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture
def resume(whole, tmp_path, monkeypatch):  # noqa: F811
    """Runs a command with a checkpoint, in a folder of this test."""
    rows = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 8}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    base = torch.load(whole, weights_only=True)["hyper_parameters"]["model"]
    values = {
        "model": {"model": base},
        "data": {"train": rows, "validation": rows, "batch_size": 4, "text": {"tokenizer": "asset://arithmetic-base"}},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "default_root_dir": str(tmp_path), **quiet},
    }
    values["trainer"]["callbacks"] = [{"class_path": OF_THE_TRAINER}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    known = DFTLightningCLI.subcommands()

    def run(path, *args, name="validate"):
        monkeypatch.setattr(DFTLightningCLI, "subcommands", staticmethod(lambda: {name: known[name]}))
        return command([name, "--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(path), *map(str, args)])

    return run


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            lambda s: {"loss": s.loss},
            f"model.loss: {MODULE}.Loss is not imported because a file names it: give it (--mo",
        ),
        (lambda s: {"loss": f"{MODULE}.Loss"}, "model.loss"),
        (lambda s: {"loss": ESCAPED}, "model.loss"),
        (
            lambda s: {"evaluation": {"answer_extractor": s.process}},
            "model.evaluation.answer_extractor: logging.FileHandler is not imported",
        ),
        (lambda s: {"peft": {"r": s.process}}, "model.peft.r: logging.FileHandler is not imported"),
        (lambda s: {"peft": {"r": str(s.process)}}, "model.peft"),
        (
            lambda s: {"peft": {"r": f"{{class_path: {OF_THE_TRAINER}}}"}},
            f"model.peft.r: {OF_THE_TRAINER} is not imported",
        ),
        (
            lambda s: {"loading": {"attn_implementation": "a-stranger/kernel"}},
            "wants attention code of a-stranger/kernel to be run",
        ),
    ],
    ids=["class", "text", "escaped", "extractor", "any", "any text", "of the trainer", "kernel"],
)
def test_options_that_are_taken(whole, resume, stranger, tmp_path, capfd, wish, message):  # noqa: F811
    path = changed(whole, tmp_path / "a.ckpt", **wish(stranger))
    with pytest.raises(SystemExit) as error:
        resume(path)
    assert error.value.code == 2
    assert message in capfd.readouterr().err
    assert not stranger.ran()


def test_a_class_that_is_given_has_the_checkpoints_options(whole, resume, stranger, tmp_path):  # noqa: F811
    path = changed(whole, tmp_path / "a.ckpt", loss=stranger.loss)
    cli = resume(path, "--model.loss", f"{MODULE}.Loss")
    assert stranger.ran()
    assert type(cli.model.loss).__module__ == MODULE


def test_options_that_are_compared(whole, resume, stranger, tmp_path):  # noqa: F811
    """What is only printed is not imported, either."""
    path = changed(whole, tmp_path / "a.ckpt", "datamodule_hyper_parameters", train=stranger.loss, test=stranger.loss)
    resume(changed(path, path, gone=stranger.loss))
    assert not stranger.ran()


def test_what_is_printed_tells_a_terminal_nothing(whole, resume, tmp_path, caplog, capfd):  # noqa: F811
    caplog.set_level("INFO")
    resume(changed(whole, tmp_path / "a.ckpt", gone="\x1b[2Jx\x9b1m"))
    assert "model.gone: no such option here (the checkpoint's run had \\x1b[2Jx\\x9b1m)" in caplog.text
    with pytest.raises(SystemExit):
        resume(changed(whole, tmp_path / "a.ckpt", loss={"class_path": "a.\x1b[2J", "init_args": {}}))
    assert "\x1b" not in capfd.readouterr().err


def test_trust_is_not_gone_on_with(adapter, resume, stranger, tmp_path, capfd):  # noqa: F811
    base = with_code(adapter[1], tmp_path / "base", stranger.code)
    path = changed(adapter[0], tmp_path / "a.ckpt", loading={"trust_remote_code": True}, model=base)
    with pytest.raises(SystemExit):
        resume(path, "--model.model", base)
    assert "wants code of its own to be run (strange.StrangeConfig" in capfd.readouterr().err
    assert not stranger.ran()


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("key", ["best_model_path", "best_k_models", "kth_best_model_path", "last_model_path"])
def test_paths_of_older_checkpoints(whole, tmp_path, key, local):  # noqa: F811
    """A callback deletes them in time: a path that only seems to be in its folder would be anybody's."""
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir()
    callback = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last=True)
    named = str(folder / ".." / "precious") if local else "memory://bucket/precious"
    state = {"best_model_score": None, "best_model_path": "", key: {named: 0.0} if key == "best_k_models" else named}
    path = changed(whole, tmp_path / "a.ckpt", "callbacks", **{callback.state_key: state})
    run = trainer(max_steps=3, default_root_dir=tmp_path, callbacks=[callback], enable_checkpointing=True)
    module = CausalLMModule(torch.load(whole, weights_only=True)["hyper_parameters"]["model"], loss=DFTLoss())
    with pytest.raises(InputError, match="has .*precious for an older one: refused"):
        run.fit(module, datamodule=arithmetic_data(8, batch_size=4), ckpt_path=path)
    assert precious.read_text() == "mine"


# -- folders of shards ---------------------------------------------------------------------------------------------


def shards(folder, change=None, value=None):
    """A folder of shards, with something changed in its index or in place of a value."""
    state = {"state_dict": {"model.weight": torch.ones(2)}, "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.95)}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, folder / "meta.pt")
    index = ShardReader(folder).read_metadata()
    if change is not None:
        change(index)
    if value is not None:
        place = next(place for name, place in index.storage_data.items() if name.fqn == "optimizer_0.lr")
        torch.save(value, folder / "value")
        place.relative_path, place.offset, place.length = "value", 0, (folder / "value").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def read_by_torch(folder):
    state = {"state_dict": {"model.weight": torch.zeros(2)}, "optimizer_0": {"lr": 0.0, "betas": (0.0, 0.0)}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def leads_out(index):
    next(iter(index.storage_data.values())).relative_path = "../elsewhere"


@pytest.mark.parametrize("place", ["index", "value", "tensor"])
def test_pickles_in_shards(stranger, tmp_path, place, capsys):  # noqa: F811
    """torch's own reader runs them, whatever it is told of weights."""
    folder = tmp_path / "shards"
    if place == "index":
        shards(folder, lambda index: setattr(index, "planner_data", [stranger.pickle()]))
    elif place == "value":
        shards(folder, value=[stranger.pickle()])
    else:

        def change(index):  # a value where a tensor is asked for
            torch.save(stranger.pickle(), folder / "value")
            index.state_dict_metadata["state_dict.model.weight"] = BytesStorageMetadata()
            at = _StorageInfo("value", 0, (folder / "value").stat().st_size)
            index.storage_data[MetadataIndex("state_dict.model.weight")] = at

        shards(folder, change)
    with pytest.raises(InputError, match="(posix|nt).mkdir"):
        check_shards(folder)
    assert export(["--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert ".mkdir" in capsys.readouterr().err
    with pytest.raises(InputError, match="(posix|nt).mkdir"):
        trainer(default_root_dir=tmp_path).fit(
            CausalLMModule("asset://arithmetic-base"), datamodule=arithmetic_data(8), ckpt_path=folder
        )
    assert not stranger.ran()
    read_by_torch(folder)
    assert stranger.ran()


def test_shards_as_torch_writes_them_are_read(tmp_path):
    folder = shards(tmp_path / "shards")
    check_shards(folder)
    assert read_by_torch(folder)["optimizer_0"] == {"lr": 0.1, "betas": (0.9, 0.95)}


def test_pickles_in_a_file_under_fsdp1(whole, stranger, tmp_path):  # noqa: F811
    """Lightning's strategy has an unpickler of its own there."""
    strategy = FSDP1OnCPU(auto_wrap_policy=set())
    guard_loading(strategy)
    guard_loading(strategy)  # once is enough
    torch.save({**torch.load(whole, weights_only=True), "more": stranger.pickle()}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="it holds more than values, (posix|nt).mkdir"):
        strategy.load_checkpoint(tmp_path / "a.ckpt")
    assert not stranger.ran()
    _lazy_load(tmp_path / "a.ckpt")
    assert stranger.ran()


def test_shards_beyond_the_folder(tmp_path):
    with pytest.raises(InputError, match="leads to ../elsewhere, out of its folder"):
        check_shards(shards(tmp_path / "shards", leads_out))
    folder = shards(tmp_path / "linked")
    file = next(folder.glob("*.distcp"))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="out of its folder"):
        check_shards(folder)


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"files": [1]}', '{"files": {"../x": "many"}}', '{"files": {"x": null}}']
)
def test_a_marker_that_is_none(tmp_path, content, capsys):
    folder = shards(tmp_path / "shards")
    (folder / "complete.json").write_text(content)
    assert export(["--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# -- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (lambda s: {"model_class": f"{MODULE}.StrangeModel"}, "is no model class of transformers"),
        (lambda s: {"model_class": "subprocess.Popen"}, "is no model class of transformers"),
        (lambda s: {"config_class": "subprocess.Popen"}, "subprocess.Popen is no class of a config of transformers"),
        (lambda s: {"tokenizer": {"../outside": b"x"}}, "its tokenizer has a file outside of its folder: ../outside"),
        (lambda s: {"tokenizer": {str(s.folder / "outside"): b"x"}}, "its tokenizer has a file outside of its folder"),
        (lambda s: {"tokenizer": {"config.json": b"{}"}}, "its tokenizer has a file of the model's: config.json"),
        (lambda s: {"tokenizer": {"": b"x"}}, "its tokenizer has a file of the model's"),
    ],
)
def test_what_a_record_names(whole, stranger, tmp_path, capsys, wish, message):  # noqa: F811
    path = changed(whole, tmp_path / "a.ckpt", "dft_lightning", **wish(stranger))
    (tmp_path / "below").mkdir()
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "below" / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not stranger.ran()
    assert not [*tmp_path.rglob("outside"), *(tmp_path / "below").iterdir()]


def test_attention_code_of_a_record(whole, stranger, tmp_path):  # noqa: F811
    """A kernel on the hub, in the config or in one within it, is neither asked for nor written."""
    record = torch.load(whole, weights_only=True)["dft_lightning"]
    config = {**json.loads(record["config"]), "attn_implementation": "a-stranger/kernel"}
    config["_attn_implementation_internal"] = "a-stranger/kernel"
    path = changed(whole, tmp_path / "a.ckpt", "dft_lightning", config=json.dumps(config))
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "out")]) == 0
    assert "kernel" not in (tmp_path / "out" / "config.json").read_text()
    assert not stranger.ran()


def test_names_in_a_card_are_text(whole, tmp_path):  # noqa: F811
    evil = "x`\n\n# Owned <script>alert(1)</script>"
    path = changed(whole, tmp_path / "a.ckpt", "dft_lightning", base=evil, metrics={f"{evil}/y": 1.0})
    path = changed(path, path, loss={"class_path": f"a.{evil}", "init_args": {}}, note="```\n# Owned too\n<script>")
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    prose, block = body.split("## Training\n\n")
    assert "<script>" not in prose
    assert "\n# Owned" not in prose
    fence, *lines = block.splitlines()
    assert fence == "````yaml"
    assert [line for line in lines if line.startswith("````")] == [lines[-1]]


def test_only_groups_of_options_are_put_together():
    """A dict of another library's options is taken as it is given."""
    saved = {"loading": {"head": "full", "quantization_config": {"load_in_4bit": True}}, "peft": {"r": 8}}
    given = {"loading": {"quantization_config": {"load_in_8bit": True}}, "peft": {"lora_alpha": 4}}
    put = {name: _with_rest(name, value, saved[name], GROUPS) for name, value in given.items()}
    assert put == {
        "loading": {"head": "full", "quantization_config": {"load_in_8bit": True}},
        "peft": {"lora_alpha": 4},
    }
