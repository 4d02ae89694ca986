"""``score``: each target's log-prob is the model's own, lies at its token in every batch, and is of no other row."""

from __future__ import annotations

import itertools
import json
import os
import signal
from datetime import datetime

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from commands import score as main
from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.assets import resolve
from dft_lightning.data import ArithmeticRows
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.errors import InputError
from dft_lightning.losses import CrossEntropyLoss, TokenLoss
from dft_lightning.scoring import command as scoring
from small_runs import data_options, run_processes, trainer

TOKENIZER = "asset://arithmetic-base"
OTHER_TEMPLATE = (
    "{% for m in messages %}{{ '^' + m['content'] if m['role'] == 'user' else m['content'] + '+$' }}{% endfor %}"
)
ROWS = [row for _, row in ArithmeticRows(24, min_digits=1, max_digits=5, seed=3).rows()]
IDS = load_tokenizer(TOKENIZER).get_vocab()


class ReadsReference(TokenLoss):
    """Reads the reference and nothing else."""

    needs = ("reference_log_prob",)

    def token_loss(self, stats):
        return -stats.log_prob * stats.reference_log_prob.exp()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama in a folder; its weights are large, so that all that stands before a token counts."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("llama")
    config = AutoConfig.for_model(**{**TINY_LLAMA, "vocab_size": len(IDS), "initializer_range": 0.5})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def in_float64(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def log_probs(model, ids):
    """Of each token after the first, given those before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return (logits - logits.exp().sum(-1, keepdim=True).log())[torch.arange(len(ids) - 1), ids[1:]]


def tokens(row):
    """Of one character each; and how many are the prompt's."""
    return [IDS[c] for c in f"^{row['prompt']}{row['completion']}$"], 1 + len(row["prompt"])


def write(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def arguments(tmp_path, model, data, **options):
    config = tmp_path / "config.yaml"
    options = {"trainer": {"accelerator": "cpu", "enable_progress_bar": False}, **options}
    data = {"tokenizer": TOKENIZER, "batch_size": 5, **data}
    config.write_text(yaml.safe_dump({"model": {"model": model}, "data": data_options(**data), **options}))
    return ["--config", str(config), "--output", str(tmp_path / "scored")]


def scored(tmp_path, model, data=None, rows=ROWS):
    """The folder of scored training rows."""
    data = {"train": write(tmp_path / "rows.jsonl", rows), **(data or {})}
    assert main(arguments(tmp_path, model, data)) == 0
    return tmp_path / "scored" / "train"


@pytest.fixture(scope="module")
def of_llama(llama, tmp_path_factory):
    return scored(tmp_path_factory.mktemp("scored"), llama)


@pytest.fixture(scope="module")
def in_pieces(llama, tmp_path_factory):
    """Of 24 tokens, which most rows are longer than."""
    return scored(tmp_path_factory.mktemp("pieces"), llama, {"packing": "bfd_split", "max_length": 24})


def data_of(rows, **options):
    return InstructionDataModule(str(rows), **data_options(tokenizer=TOKENIZER, **{"batch_size": 4, **options}))


def loaded(rows, stage="fit", **options):
    data = data_of(rows, **options)
    data.setup(stage)
    return data


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", TOKENIZER])
def test_log_probs_are_the_models_own(name, llama, tmp_path):
    weighed = [{**row, "weight": i % 3, "source": {"page": i, "note": None}} for i, row in enumerate(ROWS)]
    folder = scored(tmp_path, llama if name == "llama" else name, rows=weighed)
    model = in_float64(llama if name == "llama" else resolve(TOKENIZER))
    found = read(folder)
    assert [{k: v for k, v in row.items() if not k.startswith("reference_")} for row in found] == weighed
    for row in found:
        ids, prompt = tokens(row)
        expected = log_probs(model, ids)[prompt - 1 :] if row["weight"] else []  # a weight of 0 makes no target
        assert row["reference_log_prob"] == pytest.approx(list(map(float, expected)), abs=2e-5)
    assert len({row["reference_fingerprint"] for row in found}) == len(found)


def documents(batch):
    """Tokens, labels and reference of each document of a batch, without padding."""
    for row in range(len(batch["labels"])):
        columns = [batch[name][row].tolist() for name in ("input_ids", "labels", "reference_log_prob")]
        if "position_ids" in batch:
            starts = [i for i, position in enumerate(batch["position_ids"][row].tolist()) if position == 0]
        else:
            starts, columns = [0], [column[: int(batch["attention_mask"][row].sum())] for column in columns]
            assert not batch["reference_log_prob"][row, len(columns[0]) :].any()
        for start, stop in itertools.pairwise([*starts, len(columns[0])]):
            yield [column[start:stop] for column in columns]


def check_batches(model, batches):
    """Each target's reference is what the model itself says of it there; how many there are."""
    model, targets = in_float64(model), 0
    for batch in batches:
        assert batch["reference_log_prob"].dtype == torch.float32
        assert batch["reference_log_prob"].shape == batch["labels"].shape
        for ids, labels, reference in documents(batch):
            own = [0.0, *log_probs(model, ids).tolist()] if len(ids) > 1 else [0.0]
            expected = [value if label != -100 else 0.0 for value, label in zip(own, labels, strict=True)]
            assert reference == pytest.approx(expected, abs=2e-5)
            targets += sum(label != -100 for label in labels)
    return targets


TARGETS = sum(len(row["completion"]) + 1 for row in ROWS)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 1),
        ({"num_workers": 2}, 1),
        ({"group_by_length": True, "global_batch_size": 8}, 1),
        ({"max_length": 24}, None),
        ({"padding_free": True}, 1),
        ({"packing": "bfd", "max_length": 96}, 1),
        ({"packing": "bfd", "max_length": 24, "padding_free": True}, None),
        ({"validation_fraction": 0.25}, None),
    ],
    ids=str,
)
def test_every_batch_has_them_at_their_tokens(options, share, llama, of_llama):
    data = loaded(of_llama, **options)
    found = check_batches(llama, data.train_dataloader())
    if "validation_fraction" in options:
        found += check_batches(llama, data.val_dataloader())
        share = 1
    cut = sum(max(0, min(len(tokens(row)[0]), 24) - tokens(row)[1]) for row in ROWS)
    assert found == (TARGETS if share else cut)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", [{}, {"packing": "bfd", "max_length": 96}], ids=["rows", "packed"])
def test_streams_have_them(num_workers, packing, llama, of_llama):
    data = loaded(of_llama, streaming={}, shuffle_buffer_size=5, num_workers=num_workers, **packing)
    assert check_batches(llama, itertools.islice(data.train_dataloader(), 4)) > 100


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"streaming": {}}], ids=str)
def test_pieces_have_those_of_their_own_context(options, llama, in_pieces):
    data = loaded(in_pieces, packing="bfd_split", max_length=24, **options)
    batches = data.train_dataloader()
    if "streaming" in options:
        check_batches(llama, itertools.islice(batches, 5))
    else:
        assert check_batches(llama, batches) == TARGETS
    # What is cut off there has the first piece's, and nothing else.
    assert check_batches(llama, loaded(in_pieces, max_length=24).train_dataloader())
    if not options:
        assert check_batches(llama, loaded(in_pieces, max_length=24, validation_fraction=0.5).val_dataloader())


def test_mixtures_have_them(llama, of_llama, tmp_path):
    source = {
        "class_path": "dft_lightning.data.MixedRows",
        "init_args": {"sources": {"a": str(of_llama), "b": str(of_llama)}},
    }
    from dft_lightning.component import from_plain
    from dft_lightning.data import RowSource

    data = InstructionDataModule(from_plain(source, RowSource), batch_size=4, text={"tokenizer": TOKENIZER})
    data.setup("fit")
    assert check_batches(llama, data.train_dataloader()) == 2 * TARGETS


class Recorder(CausalLMModule):
    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), (batch["input_ids"], batch["reference_log_prob"])]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_has_the_same(streaming, llama, of_llama, tmp_path):
    def fit(steps, **options):
        module = Recorder(llama, loss=CrossEntropyLoss())
        run = trainer(max_steps=steps, default_root_dir=tmp_path)
        run.fit(module, datamodule=data_of(of_llama, streaming={} if streaming else None), **options)
        return run, module.seen

    _, whole = fit(4)
    run, first = fit(2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    _, rest = fit(4, ckpt_path=tmp_path / "a.ckpt")
    assert len(first) == len(rest) == 2
    for (ids, reference), (other_ids, other) in zip(whole, [*first, *rest], strict=True):
        assert torch.equal(ids, other_ids)
        assert torch.equal(reference, other)


def test_the_row_that_evens_out_ranks_has_them(of_llama, tmp_path):
    data = loaded(of_llama)
    loader = data.train_dataloader()
    assert loader.collate_fn([loader.dataset[-1]])["reference_log_prob"].tolist() == [[0.0, 0.0]]
    data = loaded(write(tmp_path / "rows.jsonl"))
    assert "reference_log_prob" not in next(iter(data.train_dataloader()))
    assert "reference_log_prob" not in data.train_dataloader().collate_fn([data.train_dataloader().dataset[-1]])


# -- what is refused ---------------------------------------------------------------------------------------------------


def first_batch(data):
    """Of a stream, what is wrong comes with it."""
    data.setup("fit")
    return data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)


def changed(key, value):
    return lambda row: {**row, key: value(row[key]) if callable(value) else value}


def without(key):
    return lambda row: {name: value for name, value in row.items() if name != key}


OTHERS = (
    r"row rows.jsonl:2: reference_log_prob: scored with another tokenizer, template or masking, or the row was changed"
)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"chat_template": OTHER_TEMPLATE}, OTHERS),
        (None, {"prompt_weight": 1}, OTHERS),
        (None, {"prompt_suffix": "+"}, OTHERS),
        (changed("completion", "1+1+0=2c0|2"), {}, OTHERS),
        (changed("prompt", "1+1="), {}, OTHERS),
        (changed("weight", 0), {}, OTHERS),
        (changed("reference_fingerprint", "0123"), {}, OTHERS),
        (changed("reference_fingerprint", lambda old: old + "/x"), {}, OTHERS),
        (
            changed("reference_fingerprint", 5),
            {},
            "row rows.jsonl:2: reference_fingerprint: expected a string, got int",
        ),
        (
            without("reference_fingerprint"),
            {},
            "2: reference_fingerprint: missing beside reference_log_prob: run score",
        ),
        (without("reference_log_prob"), {}, "2: reference_log_prob: missing beside reference_fingerprint: run score"),
        (
            changed("reference_log_prob", lambda old: [*old, -1.0]),
            {},
            r"\d+ log-probs, and the row has \d+ targets: run",
        ),
        (changed("reference_log_prob", lambda old: old[:-1]), {}, r"of the first \d+ targets, and \d+ are kept here"),
        (changed("reference_log_prob", "-1.0"), {}, "2: reference_log_prob: expected a list of numbers, got str"),
        (changed("reference_log_prob", lambda old: ["-1", *old[1:]]), {}, "a list of numbers, got a list with others"),
        (changed("reference_log_prob", lambda old: [-1, 0.5]), {}, r"2: reference_log_prob\[1\]: 0.5, which is no log"),
        (
            changed("reference_log_prob", lambda old: [float("nan")]),
            {},
            r"reference_log_prob\[0\]: nan, which is no log",
        ),
        (changed("reference_log_prob", lambda old: [-(10**400)]), {}, "has a whole number beyond what floats hold"),
        (changed("reference_log_prob", lambda old: [-1e39]), {}, r"reference_log_prob\[0\]: -1e\+39, which is no log"),
    ],
)
def test_log_probs_of_another_row_are_refused(change, options, message, of_llama, tmp_path):
    rows = read(of_llama)
    if change is not None:
        rows[1] = change(rows[1])
    write(tmp_path / "changed" / "rows.jsonl", rows)
    if change is None:
        message = message.replace("row rows.jsonl:2", "row rows.jsonl:1")
    for streaming in (False, True):
        with pytest.raises(InputError, match=message):
            first_batch(data_of(tmp_path / "changed", streaming={} if streaming else None, shuffle=False, **options))


def test_rows_in_another_order_keep_theirs(llama, of_llama, tmp_path):
    write(tmp_path / "rows.jsonl", [*reversed(read(of_llama)), read(of_llama)[0]])
    data = loaded(tmp_path / "rows.jsonl")
    assert check_batches(llama, data.train_dataloader()) == TARGETS + len(ROWS[0]["completion"]) + 1


def test_a_changed_row_may_be_skipped(llama, of_llama, tmp_path):
    rows = read(of_llama)
    rows[1]["completion"] += "0"
    data = loaded(write(tmp_path / "rows.jsonl", rows), on_bad_rows="skip")
    assert data.splits.counts["train"].bad == 1
    assert check_batches(llama, data.train_dataloader()) == TARGETS - len(ROWS[1]["completion"]) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "scored in pieces of 24 tokens and is whole here"),
        ({"max_length": 25}, "scored in pieces of 24 tokens and is whole here"),
        ({"packing": "bfd_split", "max_length": 20}, "in pieces of 24 tokens and is in pieces of 20 tokens here"),
    ],
)
def test_pieces_of_another_length_are_refused(options, message, in_pieces):
    with pytest.raises(InputError, match=message):
        loaded(in_pieces, **options)


def test_whole_rows_are_not_cut_into_pieces(llama, of_llama):
    with pytest.raises(InputError, match="scored whole and is in pieces of 24 tokens here: run score again with this"):
        loaded(of_llama, packing="bfd_split", max_length=24)
    data = loaded(of_llama, packing="bfd_split", max_length=200)  # which none is longer than
    assert check_batches(llama, data.train_dataloader()) == TARGETS


def test_a_larger_max_length_is_refused(llama, tmp_path):
    folder = scored(tmp_path, llama, {"max_length": 24})
    assert check_batches(llama, loaded(folder, max_length=24).train_dataloader())
    assert check_batches(llama, loaded(folder, max_length=20).train_dataloader())
    with pytest.raises(
        InputError, match=r"of the first \d+ targets, and \d+ are kept here: it was scored with a smaller"
    ):
        loaded(folder, max_length=30)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("lacking", "place"), [(0, 1), (1, 2)])
def test_all_rows_have_them_or_none(streaming, lacking, place, of_llama, tmp_path):
    rows = read(of_llama)
    rows[lacking] = ROWS[lacking]
    data = data_of(write(tmp_path / "rows.jsonl", rows), streaming={} if streaming else None, shuffle=False)
    with pytest.raises(
        InputError, match=r"row \d has (a|no) reference_log_prob, and others have.*: score every source"
    ):
        first_batch(data)


@pytest.mark.parametrize(
    ("options", "stage", "where"),
    [
        ({"train": "plain"}, "fit", "train"),
        ({"train": "plain", "streaming": {}}, "fit", "train"),
        ({"train": "plain", "validation_fraction": 0.5}, "validate", "train"),
        ({"train": "scored", "validation": "plain"}, "fit", "validation"),
        ({"train": "scored", "validation": "scored", "forgetting": "plain"}, "fit", "forgetting"),
        ({"test": "plain"}, "test", "test"),
    ],
)
def test_what_a_loss_reads_must_be_there(options, stage, where, llama, of_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(CausalLMModule, "configure_model", lambda self: pytest.fail("a model is loaded"))
    sources = {"plain": write(tmp_path / "rows.jsonl"), "scored": str(of_llama)}
    options = {name: sources.get(value, value) if name != "streaming" else value for name, value in options.items()}
    data = InstructionDataModule(**data_options(tokenizer=TOKENIZER, **options))
    message = f"data.{where}: ReadsReference reads reference_log_prob, which the rows lack: run `python -m dft"
    with pytest.raises(InputError, match=message):
        getattr(trainer(), stage)(CausalLMModule(llama, loss=ReadsReference()), datamodule=data)


def test_splits_that_are_not_run_need_none(of_llama, tmp_path):
    data = data_of(of_llama, validation=write(tmp_path / "rows.jsonl"))
    run = trainer(limit_val_batches=0)
    run.strategy.connect(CausalLMModule({"model_type": "llama"}, loss=ReadsReference()))
    data.trainer = run
    data.setup("fit")
    assert "validation" in data.splits


# -- the command -------------------------------------------------------------------------------------------------------


def fails(capfd, args):
    status = main(args)
    assert status == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err[err.index("error: ") :]


def test_each_split_gets_a_folder(llama, tmp_path, capfd):
    paths = {
        name: write(tmp_path / f"{name}.jsonl", ROWS[:3]) for name in ("train", "validation", "forgetting", "test")
    }
    args = arguments(tmp_path, llama, paths)
    assert main([*args, "--splits", "train", "test"]) == 0
    output = tmp_path / "scored"
    assert sorted(os.listdir(output)) == ["score.json", "test", "train"]
    assert f"    --data.train {output}/train --data.test {output}/test\n" in capfd.readouterr().out
    record = json.loads((output / "score.json").read_text())
    assert record["model"] == llama
    assert record["splits"]["test"]["rows"] == 3
    assert f"{output} is not empty: give another folder, or --overwrite" in fails(capfd, args)
    assert main([*args, "--overwrite"]) == 0
    assert sorted(os.listdir(output)) == ["forgetting", "score.json", "test", "train", "validation"]
    assert read(output / "train") == read(output / "forgetting")


def test_scored_rows_are_scored_again(llama, of_llama, tmp_path):
    """Whatever is wrong with what they have: it is what the data module says to do."""
    before = read(of_llama)
    broken = [without("reference_fingerprint")(before[0]), *before[1:]]
    assert main(arguments(tmp_path, TOKENIZER, {"train": write(tmp_path / "rows.jsonl", broken)})) == 0
    found = read(tmp_path / "scored" / "train")
    assert [row["reference_fingerprint"] for row in found] == [row["reference_fingerprint"] for row in before]
    assert all(row["reference_log_prob"] != old["reference_log_prob"] for row, old in zip(found, before, strict=True))


def test_a_checkpoint_is_scored_with(llama, tmp_path):
    module = CausalLMModule(llama, optimizer={"lr": 1e-2}, schedule={"decay": "constant"})
    run = trainer(max_steps=2)
    run.fit(module, datamodule=data_of(write(tmp_path / "rows.jsonl")))
    run.save_checkpoint(tmp_path / "a.ckpt")
    args = arguments(tmp_path, llama, {"train": str(tmp_path / "rows.jsonl")})
    assert main([*args, "--ckpt_path", str(tmp_path / "a.ckpt")]) == 0
    trained = module.model.double().eval()
    for row in read(tmp_path / "scored" / "train"):
        ids, prompt = tokens(row)
        assert row["reference_log_prob"] == pytest.approx(log_probs(trained, ids)[prompt - 1 :].tolist(), abs=2e-5)


def test_the_configs_loss_and_run_do_not_matter(llama, of_llama, tmp_path):
    """A loss that reads references needs none to make them; callbacks stay away."""
    loss = {"class_path": f"{__name__}.ReadsReference"}
    callback = {"class_path": "GenerationEvaluation", "init_args": {"every_n_steps": 1}}
    options = {"max_steps": 3, "limit_predict_batches": 1, "callbacks": [callback]}
    args = arguments(
        tmp_path, llama, {"train": write(tmp_path / "rows.jsonl")}, trainer={"accelerator": "cpu", **options}
    )
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"model": llama, "loss": loss}}))
    assert main(args) == 0
    assert read(tmp_path / "scored" / "train") == read(of_llama)


def test_bad_rows_are_refused_or_left_out(llama, tmp_path, capfd, monkeypatch):
    bad = [ROWS[0], {"prompt": "1+1="}, ROWS[1]]
    args = arguments(tmp_path, llama, {"train": write(tmp_path / "rows.jsonl", bad)})
    with monkeypatch.context() as patch:
        patch.setattr(CausalLMModule, "configure_model", lambda self: pytest.fail("a model is loaded"))
        assert "rows.jsonl: 1 of 3 rows are bad\n  row 2: completion: missing" in fails(capfd, args)
    assert not (tmp_path / "scored").exists()
    assert main([*args, "--data.rows.on_bad_rows", "skip"]) == 0
    assert len(read(tmp_path / "scored" / "train")) == 2
    assert json.loads((tmp_path / "scored" / "score.json").read_text())["splits"]["train"]["bad_rows"] == 1


def test_columns_that_json_cannot_hold_are_left_out_unless_they_are_read(llama, tmp_path, capfd):
    rows = [{**row, "at": datetime(2026, 1, 1), "raw": b"x"} for row in ROWS[:3]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    args = arguments(tmp_path, llama, {"train": str(tmp_path / "rows.parquet")})
    assert main(args) == 0
    assert set(read(tmp_path / "scored" / "train")[0]) == {*ROWS[0], "reference_log_prob", "reference_fingerprint"}
    assert json.loads((tmp_path / "scored" / "score.json").read_text())["splits"]["train"]["columns_left_out"] == [
        "at",
        "raw",
    ]
    loaded(tmp_path / "scored" / "train")
    turns = [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "1+1+0=2c0|2"}]
    rows = [{"conversations": [{**turn, "at": datetime(2026, 1, 1)} for turn in turns]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert "rows.parquet: row 1: has values that a .jsonl file does not hold" in fails(capfd, [*args, "--overwrite"])


def test_two_processes_write_what_one_does(llama, of_llama, tmp_path):
    """An odd number of batches, of which ranks take turns."""
    args = arguments(tmp_path, llama, {"train": write(tmp_path / "rows.jsonl")})
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    said = run_processes("two_command.py", "score", *args, *two)
    assert said.count("add to fit") == 1
    of_one, of_two = read(of_llama), read(tmp_path / "scored" / "train")
    close = [[line.pop("reference_log_prob") for line in lines] for lines in (of_one, of_two)]
    assert of_two == of_one
    for one, other in zip(*close, strict=True):
        assert other == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(number, status, llama, tmp_path, monkeypatch, capfd):
    own, calls = scoring.target_log_probs, []

    def killed(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return own(self, batch, batch_idx)

    monkeypatch.setattr(scoring, "target_log_probs", killed)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    args = arguments(tmp_path, llama, {"train": write(tmp_path / "rows.jsonl")})
    assert main(args) == status
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "rows.jsonl"]
    assert "Traceback" not in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_model_that_overflows_is_refused(llama, tmp_path, monkeypatch, capfd):
    own = scoring.target_log_probs
    monkeypatch.setattr(scoring, "target_log_probs", lambda *args: [part * float("nan") for part in own(*args)])
    args = arguments(tmp_path, llama, {"train": write(tmp_path / "rows.jsonl")})
    assert "rows.jsonl: row 1: the model's log-prob of target 1 is nan" in fails(capfd, args)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--splits", "test"], "--splits test: data.test is not set"),
        (["--splits", "validation", "--data.validation_fraction", "0.5"], "it is a part of data.train"),
        (
            ["--splits", "predict"],
            "--splits: expected one of 'train', 'validation', 'forgetting', 'test'. Got value: predict",
        ),
        (["--data.train", "none.jsonl"], "none.jsonl: no such file"),
        (["--data.trian", "x"], "unknown key data.trian; did you mean data.train?"),
        (["--model.model", "no/such/model"], "model.model"),
        (["--ckpt_path", "none.ckpt"], "--ckpt_path: no such checkpoint: none.ckpt"),
        (["--ckpt_path", "."], "--ckpt_path: . is a folder of shards, which score does not read: export it"),
        (["--data.text.max_length", "2"], "rows.jsonl: no row has a target"),
    ],
)
def test_one_message_for_one_mistake(options, message, llama, tmp_path, capfd):
    args = arguments(tmp_path, llama, {"train": write(tmp_path / "rows.jsonl")})
    assert message in fails(capfd, [*args, *options])
    assert not (tmp_path / "scored").exists()


def test_mixtures_are_scored_source_by_source(llama, tmp_path, capfd):
    mixture = {"class_path": "MixedRows", "init_args": {"sources": {"a": write(tmp_path / "rows.jsonl")}}}
    message = fails(capfd, arguments(tmp_path, llama, {"train": mixture}))
    assert "data.train: a mixture's rows cannot be scored together: score each of its sources" in message
