"""Checkpoints as Hugging Face folders: the same tensors, the same log-probs, nothing half-written, one message each."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, PreTrainedModel, pipeline

from commands import export as main
from conftest import at_hand
from dft_lightning import CausalLMModule, DFTLoss, HuggingFaceExport, InstructionDataModule
from dft_lightning.data import ArithmeticRows, RowSource
from dft_lightning.errors import InputError
from dft_lightning.export.model import _config_of
from dft_lightning.models.generation import Completions
from dft_lightning.modules import GenerationOptions
from dft_lightning.modules.resume.saved import Checkpoints
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer

CHAT = (
    "{% for m in messages %}{{ '^' if m['role'] == 'user' else '' }}{{ m['content'] }}"
    "{{ '$' if m['role'] == 'assistant' else '' }}{% endfor %}"
)


def trained(model, path, data=None, steps=2, **options):
    """A module after some steps, whose checkpoint is at ``path``."""
    module = CausalLMModule(model, loss=DFTLoss(), optimizer={"lr": 1e-2}, schedule={"decay": "constant"}, **options)
    run = trainer(max_steps=steps, default_root_dir=path.parent)
    run.fit(module, datamodule=data or arithmetic_data(16, batch_size=4))
    run.save_checkpoint(path)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with one checkpoint, and the module."""
    folder = tmp_path_factory.mktemp("run")
    data = arithmetic_data(16, batch_size=4, chat_template=CHAT)
    return folder, trained("asset://arithmetic-base", folder / "checkpoints" / "a.ckpt", data)


def log_probs(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def of_module(module, ids):
    """By the module's own head."""
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return module.token_output(batch).log_prob.reshape(len(ids), -1)


def exported(folder, output, *options):
    assert main(["--checkpoint", str(folder), "--output", str(output), *options]) == 0
    return output


def assert_same_tensors(module, output):
    saved = load_file(output / "model.safetensors")
    state = module.model.state_dict()
    assert saved
    for name, tensor in saved.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_the_folder_has_the_model_that_was_trained(run, tmp_path):
    folder, module = run
    output = exported(folder, tmp_path / "out")
    assert_same_tensors(module, output)
    before = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.randint(3, 20, (4, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_probs(before, ids), of_module(module.eval(), ids), rtol=0, atol=1e-5)


def test_the_folder_has_the_tokenizer_and_ends_turns_as_the_module_does(run, tmp_path):
    folder, module = run
    output = exported(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.get_chat_template() == CHAT
    assert tokenizer.backend_tokenizer.to_str() == module.tokenizer.backend_tokenizer.to_str()
    generate = pipeline("text-generation", str(output), device="cpu")
    messages = [{"role": "user", "content": "12+34="}]
    found = generate(messages, max_new_tokens=20, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = module.eval().generate(ids, torch.ones_like(ids), GenerationOptions(max_new_tokens=20))
    assert [found] == expected
    assert found


LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20, "tie_word_embeddings": True}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_or_not_in_the_dtype_of_training(tmp_path, tied, dtype):
    module = trained({**LLAMA, "tie_word_embeddings": tied}, tmp_path / "a.ckpt", loading={"dtype": dtype})
    output = exported(tmp_path / "a.ckpt", tmp_path / "out")
    assert ("lm_head.weight" in load_file(output / "model.safetensors")) != tied
    assert_same_tensors(module, output)
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype


def test_experts_are_written_as_from_pretrained_reads_them(tmp_path):
    config = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20, "num_local_experts": 4}
    module = trained(config, tmp_path / "a.ckpt")
    output = exported(tmp_path / "a.ckpt", tmp_path / "out")
    loaded, state = AutoModelForCausalLM.from_pretrained(output).state_dict(), module.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_another_dtype_and_several_files(run, tmp_path):
    folder, module = run
    output = exported(folder, tmp_path / "out", "--dtype", "bfloat16", "--max_shard_size", "200KB")
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 1
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    state = module.model.state_dict()
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in saved.items())


def test_a_published_model(tmp_path):
    model = at_hand("models/stories260K")
    rows = ArithmeticRows(8, seed=1)
    module = trained(
        str(model), tmp_path / "a.ckpt", InstructionDataModule(rows, batch_size=4, text={"tokenizer": str(model)})
    )
    output = exported(tmp_path / "a.ckpt", tmp_path / "out")
    assert_same_tensors(module, output)
    ids = torch.randint(3, 500, (4, 100), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(output).eval()
    torch.testing.assert_close(log_probs(loaded, ids), of_module(module.eval(), ids), rtol=0, atol=1e-5)


def test_the_card_says_what_was_trained(tmp_path):
    data = arithmetic_data(16, batch_size=4)
    data.sources["validation"] = ArithmeticRows(4, seed=2)
    module = trained("asset://arithmetic-base", tmp_path / "a.ckpt", data, steps=4)
    card = (exported(tmp_path / "a.ckpt", tmp_path / "out") / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dft-lightning", "DFTLoss"],
    }
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 1e-2
    assert settings["data"]["train"]["init_args"]["num_rows"] == 16
    assert settings["trainer"]["max_steps"] == 4
    nll = module.trainer.callback_metrics["val/nll"]
    assert f"| val/nll | {float(nll):.5g} |" in body
    assert "4 optimizer steps" in body


def test_the_hub_name_of_the_base_is_in_the_card(run, tmp_path):
    content = torch.load(run[0] / "checkpoints" / "a.ckpt", weights_only=True)
    content["dft_lightning"]["base"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    torch.save(content, tmp_path / "a.ckpt")
    card = (exported(tmp_path / "a.ckpt", tmp_path / "out") / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_run_gives_its_newest_whole_checkpoint(run, tmp_path, capsys):
    source = run[0] / "checkpoints" / "a.ckpt"
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    content = torch.load(source, weights_only=True)
    for step in (5, 6):
        torch.save({**content, "global_step": step}, folder / f"step={step}.ckpt")
        os.utime(folder / f"step={step}.ckpt", ns=(step * 10**9, step * 10**9))
    broken = folder / "step=7.ckpt"
    broken.write_bytes(source.read_bytes()[:-2000])
    exported(tmp_path, tmp_path / "out")
    assert "step=6.ckpt, step 6" in capsys.readouterr().out
    for path in folder.glob("step=[56].ckpt"):
        path.unlink()
    assert main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "other")]) == 2
    assert "none of the 1 checkpoints in" in capsys.readouterr().err


def broken_checkpoints(source, folder):
    """By name: what is wrong, and what the message says."""
    content = torch.load(source, weights_only=True)
    record = content["dft_lightning"]
    (folder / "empty").mkdir()
    (folder / "shards").mkdir()
    (folder / "shards" / "meta.pt").write_bytes(b"")
    (folder / "cut.ckpt").write_bytes(source.read_bytes()[:5000])
    (folder / "text.ckpt").write_text("none")
    torch.save([1], folder / "list.ckpt")
    without = {name: value for name, value in content.items() if name != "dft_lightning"}
    torch.save(without, folder / "without.ckpt")
    missing = {name: value for name, value in content["state_dict"].items() if "layers.0" not in name}
    torch.save({**content, "state_dict": missing}, folder / "missing.ckpt")
    other = {**record, "model_class": "torch.nn.modules.linear.Linear"}
    torch.save({**content, "dft_lightning": other}, folder / "other.ckpt")
    gone = {**record, "model_class": "transformers_modules.nobody.Model"}
    torch.save({**content, "dft_lightning": gone}, folder / "gone.ckpt")
    state = dict(content["state_dict"])
    head = next(name for name in state if name.endswith(("lm_head.weight", "embed_out.weight")))
    state[head] = state[head] + 1
    torch.save({**content, "state_dict": state}, folder / "tied.ckpt")
    return {
        "nothing": "no such file or folder",
        "empty": "has no checkpoint (*.ckpt)",
        "shards": "is cut short: it lacks .metadata",
        "cut.ckpt": "is cut short or no checkpoint",
        "text.ckpt": "is cut short or no checkpoint",
        "list.ckpt": "is not a Lightning checkpoint",
        "without.ckpt": "has no record of its model",
        "missing.ckpt": "the weights are not of its",
        "other.ckpt": "is no model class of transformers",
        "gone.ckpt": "is no model class of transformers; a model of one's own",
        "tied.ckpt": "its config ties",
    }


def test_a_broken_checkpoint_ends_in_one_message_and_no_folder(run, tmp_path, capsys):
    for name, words in broken_checkpoints(run[0] / "checkpoints" / "a.ckpt", tmp_path).items():
        assert main(["--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2, name
        err = capsys.readouterr().err
        assert err.startswith("error: "), name
        assert words in err, name
        assert str(tmp_path / name) in err, name
        assert err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_is_there_is_kept(run, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    exported(run[0], output)  # an empty one is taken
    weights = (output / "model.safetensors").read_bytes()
    arguments = ["--checkpoint", str(run[0]), "--output", str(output)]
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    (output / "old").write_text("")
    assert main([*arguments, "--overwrite", "--dtype", "float64"]) == 0
    assert (output / "model.safetensors").read_bytes() != weights
    assert not (output / "old").exists()

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    assert main(["--checkpoint", str(run[0]), "--output", str(other), "--overwrite"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["--checkpoint", str(run[0]), "--output", str(other / "thesis.tex")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (other / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "model.safetensors"), KeyboardInterrupt()])
def test_a_folder_that_was_not_finished_is_not_there(run, tmp_path, monkeypatch, capsys, error):
    output = exported(run[0], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fails(self, folder, **options):
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)
    for name, options in (("out", ["--overwrite"]), ("new", [])):
        arguments = ["--checkpoint", str(run[0]), "--output", str(tmp_path / name), *options]
        if isinstance(error, KeyboardInterrupt):
            assert main(arguments) == 130
        else:
            assert main(arguments) == 2
            assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_at_the_end_of_fit(tmp_path):
    output = tmp_path / "out"
    module = CausalLMModule("asset://arithmetic-base", loss=DFTLoss())
    trainer(callbacks=[HuggingFaceExport(str(output))]).fit(module, datamodule=arithmetic_data(8, batch_size=4))
    assert_same_tensors(module, output)
    assert "1 optimizer steps" in (output / "README.md").read_text()
    with pytest.raises(InputError, match="is not empty"):
        trainer(callbacks=[HuggingFaceExport(str(output))]).fit(module, datamodule=arithmetic_data(8, batch_size=4))
    own = trainer(callbacks=[HuggingFaceExport()], default_root_dir=tmp_path)
    own.fit(module, datamodule=arithmetic_data(8, batch_size=4))
    assert_same_tensors(module, tmp_path / "huggingface")


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss())
    run = trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    output = exported(tmp_path / "a.ckpt", tmp_path / "out")
    assert "without a tokenizer" in capsys.readouterr().out
    assert_same_tensors(module, output)


def test_a_model_that_cannot_be_described_is_saved_all_the_same(run, tmp_path, monkeypatch):
    def fails(self, **options):
        raise TypeError("not serialisable")

    content = run[1].model.config
    monkeypatch.setattr(type(content), "to_json_string", fails)
    with pytest.warns(UserWarning, match="this checkpoint cannot be exported: not serialisable"):
        run[1].trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]


def test_what_a_base_brings_along(tmp_path):
    """A generation config that would not pass as new, several chat templates, values untied that the config ties."""
    trained(LLAMA, tmp_path / "first.ckpt")
    base = exported(tmp_path / "first.ckpt", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": CHAT, "tool_use": CHAT + " "}
    tokenizer.save_pretrained(base)
    state = load_file(base / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, base / "model.safetensors")
    data = arithmetic_data(8, batch_size=4, tokenizer=str(base))
    module = trained(str(base), tmp_path / "a.ckpt", data)
    ends = module.model.get_input_embeddings().weight, module.model.get_output_embeddings().weight
    assert module.model.config.tie_word_embeddings
    assert ends[0] is not ends[1]
    output = exported(tmp_path / "a.ckpt", tmp_path / "out")
    assert_same_tensors(module, output)
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.6
    assert AutoTokenizer.from_pretrained(output).chat_template == {"default": CHAT, "tool_use": CHAT + " "}


def test_infinity_in_a_config():
    model = torch.nn.Linear(1, 1)
    model.config = Mamba2Config()
    builder = SimpleNamespace(given=None, base_name=None)
    found = _config_of(Checkpoints(builder, None, {}, None, None).record(model, Completions(lambda: None), None))
    assert list(found.time_step_limit) == [0.0, float("inf")]


class InMemory(RowSource):
    def __init__(self, rows):
        self.given = rows

    def rows(self):
        return enumerate(self.given, 1)


def test_rows_in_memory_are_in_no_checkpoint_or_card(tmp_path):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(200)]
    trained("asset://arithmetic-base", tmp_path / "a.ckpt", InstructionDataModule(InMemory(rows), batch_size=100))
    text = str({**torch.load(tmp_path / "a.ckpt", weights_only=True), "state_dict": None, "optimizer_states": None})
    assert "199+1=" not in text
    assert "not saved: 200 items" in (exported(tmp_path / "a.ckpt", tmp_path / "out") / "README.md").read_text()


class Foreign(pl.LightningDataModule):
    """Somebody's own, with options that have no plain form."""

    def __init__(self, device, folder):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
        return torch.utils.data.DataLoader(rows, batch_size=2)


def test_somebody_elses_data_module(tmp_path):
    module, output = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss()), tmp_path / "out"
    data = Foreign(torch.device("cpu"), tmp_path)
    trainer(callbacks=[HuggingFaceExport(str(output))]).fit(module, datamodule=data)
    card = (output / "README.md").read_text()
    assert "not saved: torch.device has no plain form" in card
    assert str(tmp_path) in card
    assert_same_tensors(module, output)


class OwnModel(CausalLMModule):
    def build_model(self):
        return Wrapper(super().build_model())


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def test_what_cannot_be_exported_is_said_before_training(tmp_path):
    data = arithmetic_data(8, batch_size=4)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    for callback, words, kind in (
        (HuggingFaceExport(str(taken)), "is not empty", CausalLMModule),
        (HuggingFaceExport(str(tmp_path / "new")), "Wrapper is no model class of transformers", OwnModel),
    ):
        module = kind(TINY_ARITHMETIC, loss=DFTLoss(), loading={"head": "full"})
        run = trainer(callbacks=[callback])
        with pytest.raises(InputError, match=words):
            run.fit(module, datamodule=data)
        assert run.global_step == 0
    trial = trainer(callbacks=[HuggingFaceExport(str(taken), overwrite=True)], fast_dev_run=True, max_steps=-1)
    trial.fit(CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss()), datamodule=data)
    assert [path.name for path in taken.iterdir()] == ["config.json"]
    for options in ({"dtype": "bf16"}, {"max_shard_size": "5"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            HuggingFaceExport(**options)


def test_checkpoints_are_not_overwritten(run, tmp_path, capsys):
    output = exported(run[0], tmp_path / "out")
    for name in ("last.ckpt", "checkpoints/last.ckpt"):
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copy(run[0] / "checkpoints" / "a.ckpt", output / name)
        assert main(["--checkpoint", str(output / name), "--output", str(output), "--overwrite"]) == 2
        assert f"has {name.split('/')[0]} in it" in capsys.readouterr().err
        (output / name).unlink()
    assert main(["--checkpoint", str(run[0]), "--output", str(tmp_path / "o"), "--max_shard_size", "5"]) == 2
    assert "expected a size such as 5GB" in capsys.readouterr().err
    for error in (OSError(28, "No space left on device"), RuntimeError("half")):  # as write and safetensors say it
        assert "cannot be written to" in fails_with(error, run, tmp_path / "o", capsys)


def fails_with(error, run, output, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", lambda *args, **options: (_ for _ in ()).throw(error))
        assert main(["--checkpoint", str(run[0]), "--output", str(output)]) == 2
    assert not output.exists()
    return capsys.readouterr().err


def test_the_base_need_not_be_there_any_more(run, tmp_path):
    base = exported(run[0], tmp_path / "base")
    module = trained(str(base), tmp_path / "a.ckpt", arithmetic_data(8, batch_size=4))
    shutil.rmtree(base)
    assert_same_tensors(module, exported(tmp_path / "a.ckpt", tmp_path / "out"))
