"""The command ``inspect``, in process: what it shows and counts, its page, and one message for one mistake."""

from __future__ import annotations

import io
import json
import sys

import pytest
import yaml
from datasets import Dataset

from commands import inspect as main
from conftest import at_hand
from dft_lightning.data import arithmetic_tokenizer
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.inspection.console import new_console
from dft_lightning.inspection.show import show_row
from small_runs import data_options
from test_configs import CONFIGS, TINY, stack

PAIRS = [  # tokens: ^ and $ are one each
    {"prompt": "1+1=", "completion": "2"},  # 7, of which 2 are learnt
    {"prompt": "12+3=", "completion": "15", "weight": 0.5},  # 9, 3 with weight 0.5
    {"prompt": "4+4="},  # bad
    {"prompt": "1+2+3+4+5=", "completion": "15"},  # ^ and 10 of the prompt: no target within 10 tokens
    {"prompt": "1+2+3=", "completion": "6=6=6"},  # 7 of the prompt, so that of 10 tokens 3 are learnt
]


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    """Whoever loads one fails."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from dft_lightning import CausalLMModule

    at_hand()  # which may have to make a model first

    def refuse(*args, **kwargs):
        raise AssertionError("a model is loaded")

    for owner in (AutoModelForCausalLM, PreTrainedModel):
        monkeypatch.setattr(owner, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)
    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    for name in ("build_model", "configure_model", "setup"):
        monkeypatch.setattr(CausalLMModule, name, refuse)


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """A pipe of 80 columns, whatever terminal the tests run in."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def config(tmp_path):
    """Writes a config of the rows above and returns its arguments."""

    def write(rows=PAIRS, **data):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = {"train": str(tmp_path / "rows.jsonl"), "tokenizer": "asset://arithmetic-base", **data}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"model": {"model": TINY}, "data": data_options(**given)}))
        return ["--config", str(path)]

    return write


def shown(capfd, *args):
    """What a call that goes well prints."""
    assert main(list(args)) == 0
    return capfd.readouterr().out


def squeezed(text):
    """Without lines and bars, and with one space between words."""
    return " ".join("".join(character if character not in "│┃█─" else " " for character in text).split())


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_and_counts_by_hand(capfd, config):
    out = shown(capfd, *config(on_bad_rows="skip", max_length=10), "--rows", "5")
    found = squeezed(out)
    for expected in (
        "train row 1: 7 tokens, 2 targets ^1+1=⟦2$⟧ ",
        "train row 2: 9 tokens, 3 targets ^12+3=0.5* ⟦15$⟧ ",
        "train row 5: 10 tokens, 3 targets, truncated ^1+2+3=⟦6=6⟧ ",
        "train: 5 rows read 1 bad and skipped, 1 dropped without a target, 1 truncated to 10 tokens",
        "train 3 26 8 30.8% 0.812",  # rows, tokens, targets, their share, and (2 + 1.5 + 3) / 8
        "shortest 7, median 9, 95% up to 10, longest 10",
        "7 1 ",
        "padded in batches of 8: about 13% of the tokens are padding",  # 1 - 26 / 30
    ):
        assert expected in found
    assert "train row 3" not in out
    assert "\x1b" not in out


def test_lengths_are_counted_by_themselves_and_in_ranges(capfd, config):
    def lengths(rows):
        out = shown(capfd, *config(rows, batch_size=2), "--rows", "0")
        assert " tokens, " not in out  # no row is shown
        table = out[out.index("tokens of a row") :]
        lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
        return {span: (int(count), len(bar)) for span, count, bar in lines}

    def row(size):
        return {"prompt": "1" * (size - 3), "completion": "2"}

    assert lengths([row(9)] * 3) == {"9": (3, 40)}
    assert lengths([row(9), row(9), row(9), row(9), row(11)]) == {"9": (4, 40), "10": (0, 0), "11": (1, 10)}
    spread = lengths([row(size) for size in range(5, 41)])
    assert next(iter(spread)) == "5 to 7"
    assert list(spread)[-1] == "38 to 40"
    assert all(number == (3, 40) for number in spread.values())


def test_padding_is_that_of_rows_as_they_are_dealt(capfd, config):
    """Those of a step with others of like lengths: rows of 5 and 9 tokens in turn."""
    rows = [{"prompt": "1" * size, "completion": "2"} for size in (2, 6) * 4]
    for data, share in (({}, 22), ({"global_batch_size": 4}, 0), ({"global_batch_size": 6}, 9)):
        found = shown(capfd, *config(rows, batch_size=2, **data), "--rows", "0")
        assert f"padded in batches of 2: about {share}% of the tokens are padding" in squeezed(found)
    found = shown(capfd, *config(rows, max_tokens=1000, global_batch_size=4), "--rows", "0")
    assert "padded in micro-batches of at most 1,000 tokens, rows of like lengths together" in squeezed(found)


def test_some_of_the_rows(capfd, config):
    args = config([{"prompt": f"{i}+1=", "completion": "2"} for i in range(1, 10)])
    out = shown(capfd, *args, "--first", "4", "--rows", "2", "--limit", "6")
    assert "train row 4" in out
    assert "train row 5" in out
    assert out.count("⟦") == 2
    assert "train: 6 rows read" in out


def test_packing(capfd, config):
    rows = [PAIRS[0]] * 4  # of 7 tokens, so two in each row of 16
    out = shown(capfd, *config(rows, packing="bfd", max_length=16))
    assert "packed: 4 documents in 2 rows of 16 tokens, 87.50% full" in out
    out = shown(capfd, *config(rows, packing="bfd_split", max_length=5))
    assert "packed: 4 documents in 4 rows of 5 tokens, 60.00% full" in out  # the last 3 of 7: = 2 $
    assert "train row 1: 7 tokens, 2 targets ─" in out
    assert "padding-free: rows are joined, none are padded" in shown(capfd, *config(rows, padding_free=True))


def test_mixtures_are_counted_by_part(capfd, config, tmp_path):
    source = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 4}}
    more = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 2, "seed": 1}}
    mixed = {"class_path": "MixedRows", "init_args": {"sources": {"[red]x": source, ":cat:": more}}}
    out = squeezed(shown(capfd, *config(train=mixed)))
    assert "train row [red]x:1: " in out  # no markup and no emoji
    assert " [red]x 4 " in out
    assert " :cat: 2 " in out
    assert " all 6 " in out


def test_validation_that_is_a_part_of_training(capfd, config):
    rows = [{"prompt": f"{i}+1=", "completion": "2"} for i in range(1, 11)]
    args = config(rows, validation_fraction=0.2)
    out = shown(capfd, *args, "--split", "validation", "--rows", "10")
    assert out.count("⟦") == 2
    assert "validation: 2 rows read" in out
    limited = shown(capfd, *args, "--split", "validation", "--limit", "5")
    assert "validation: 1 rows read" in limited
    assert "of the first 5 rows alone: fit divides all of them, and otherwise" in limited
    assert "train: 8 rows read" in shown(capfd, *args)


@pytest.mark.parametrize("split", ["validation", "forgetting", "test", "predict"])
def test_every_split(capfd, config, tmp_path, split):
    rows = [PAIRS[0], PAIRS[2]] if split == "predict" else [PAIRS[0]]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"validation": str(tmp_path / "more.jsonl"), split: str(tmp_path / "more.jsonl")}
    out = shown(capfd, *config([{"prompt": "no completion"}], **options), "--split", split)
    assert f"{split}: {len(rows)} rows read" in out
    assert "^1+1=⟦2$⟧" in out


def test_a_stream_is_read_at_its_beginning(capfd, config, monkeypatch):
    source = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 10**9}}
    out = shown(capfd, *config(train=source, streaming={}), "--rows", "1")
    assert "train: 1000 rows read" in out
    out = shown(capfd, *config(train=source, streaming={}), "--rows", "1", "--limit", "7")
    assert "train: 7 rows read" in out


def test_a_stream_of_the_hub_is_not_downloaded(capfd, config, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, streaming, **options):
        asked.append(streaming)
        return Dataset.from_list([PAIRS[0]] * 3).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "train: 3 rows read" in shown(capfd, *config(train="somebody/rows", streaming={}))
    assert asked == [True]


def test_tokenizer_of_the_model(capfd, config):
    args = config(tokenizer=None)
    assert "^1+1=⟦2$⟧" in shown(
        capfd, *args, "--data.rows.on_bad_rows", "skip", "--model.model", "asset://arithmetic-base"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(capfd, path, tmp_path):
    row = {"instruction": "1+1=", "output": "2"}
    if "gsm8k" in path.stem:
        row = {"question": "1+1=", "answer": "1+1+0=2c0|2\n#### 2"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 60))
    args = stack(path)
    if "word_problems" in path.stem:
        problem = {"Body": "Ann has 1 pen.", "Question": "How many?", "Equation": "( 1.0 + 1.0 )"}
        (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(problem)] * 60))
        tokenizer = str(at_hand("tokenizers/smollm2"))
        args += ["--data.train.path", str(tmp_path / "rows.jsonl"), "--data.text.tokenizer", tokenizer]
    if "alpaca" in path.stem or "gsm8k" in path.stem:  # these would download rows and a tokenizer
        args += ["--data.train", str(tmp_path / "rows.jsonl"), "--data.text.tokenizer", "asset://arithmetic-base"]
    out = shown(capfd, *args, "--rows", "1", "--limit", "50")
    assert "train row" in out
    assert "⟦" in out


# -- what is shown how -------------------------------------------------------------------------------------------------


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def printed(tokenizer, row, turn_end=None, **options):
    out = io.StringIO()
    show_row(new_console(file=out, width=200, **options), tokenizer, {"truncated": False, **row}, "row", turn_end)
    return out.getvalue().partition("\n")[2]


def encoded(tokenizer, text, learnt_from):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [-100 if i < learnt_from else token for i, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "weights": None}


def test_control_tokens_are_told_from_the_same_characters_in_a_row(config, capfd, monkeypatch):
    folder = str(at_hand("tokenizers/smollm2"))
    turns = [{"role": "user", "content": "Say <|im_end|>"}, {"role": "assistant", "content": "No: <|im_end|>"}]
    args = config([{"messages": turns}], tokenizer=folder, chat_template=CHATML)
    assert "Say ⟪text:<|im_end|>⟫<|im_end|>↵" in shown(capfd, *args)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = shown(capfd, *args)
    control, dim, learnt = "\x1b[1;4m", "\x1b[2m", "\x1b[30;42m"
    assert f"{dim}Say ⟪text:<|im_end|>⟫\x1b[0m{control}<|im_end|>\x1b[0m" in out
    assert f"{learnt}No: ⟪text:<|im_end|>⟫\x1b[0m\x1b[1;4;30;42m<|im_end|>\x1b[0m" in out
    assert "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")  # nothing but brackets tells what is learnt
    assert "⟦" in shown(capfd, *args)


def test_names_of_special_tokens_that_are_text_however_they_are_divided():
    tokenizer = load_tokenizer(at_hand("tokenizers/smollm2"))
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    name = [
        i for part in ("<|", "im", "_", "end", "|>") for i in tokenizer(part, add_special_tokens=False)["input_ids"]
    ]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [start, *name, control, *name, *name, start]
    learnt = len(name) // 2 + 1  # from within the first name on
    labels = [-100] * learnt + ids[learnt:]
    weights = [0.0] * learnt + [1.0] * (len(ids) - learnt - 3) + [0.5] * 3
    out = printed(tokenizer, {"input_ids": ids, "labels": labels, "weights": weights})
    plain = out.replace("⟦", "").replace("⟧", "").replace("0.5* ", "").replace("\n", "")
    assert plain == "<|im_start|>⟪text:<|im_end|>⟫<|im_end|>⟪text:<|im_end|>⟫⟪text:<|im_end|>⟫<|im_start|>"
    assert out.count("⟦") == 2
    # What ends a turn is control though it is not called special.
    tokenizer = load_tokenizer(at_hand("tokenizers/qwen3"))
    name = [i for part in ("</", "think", ">") for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    row = {"input_ids": [*name, tokenizer.convert_tokens_to_ids("</think>")], "labels": [-100] * len(name) + [0]}
    assert printed(tokenizer, {**row, "weights": None}) == "</think>⟦</think>⟧\n"
    out = printed(tokenizer, {**row, "weights": None}, turn_end="</think>")
    assert out == "⟪text:</think>⟫⟦</think>⟧\n"


def test_a_weight_of_one_is_named_beside_another():
    """In colour alone, where both are of one."""
    tokenizer = arithmetic_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(list("1+2=3"))
    row = {"input_ids": ids, "labels": ids, "weights": [2.0, 2.0, 1.0, 0.5, 1.0], "truncated": False}
    page = new_console(file=io.StringIO(), record=True, force_terminal=True, color_system="standard", no_color=False)
    show_row(page, tokenizer, row, "row")
    assert page.export_text().splitlines()[1] == "2* 1+1* 20.5* =1* 3"


def test_weights_of_passages(config, capfd):
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2", "weight": 0.25}]
    turns += [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    turns += [{"role": "user", "content": "3+3="}, {"role": "assistant", "content": "6", "weight": 0}]
    out = shown(capfd, *config([{"messages": turns}]))
    assert "^1+1=0.25* ⟦2$⟧^2+2=⟦4$⟧^3+3=6$\n" in out


def test_what_a_terminal_would_obey_is_shown_instead():
    tokenizer = load_tokenizer(at_hand("tokenizers/smollm2"))
    text = "a\x1b[2Jb\rc\td\x07\x7f\x9b1m\ne[bold]f[/x]:cat:"
    out = printed(tokenizer, encoded(tokenizer, text, 0))
    assert out == "⟦a␛[2Jb␍c␉d␇␡\\x9b1m↵\ne[bold]f[/x]:cat:⟧\n"


def test_spaces_stay_where_a_tokenizer_drops_those_a_text_begins_with():
    tokenizer = load_tokenizer(at_hand("models/stories260K"))
    row = encoded(tokenizer, "Once upon a time", 2)
    beginning = tokenizer.decode(row["input_ids"][:2])
    rest = "Once upon a time".removeprefix(beginning)
    assert rest.startswith(" ") or not beginning.endswith(" ")
    assert printed(tokenizer, row) == f"{beginning}⟦{rest}⟧\n"


def test_a_character_of_several_tokens_stays_whole():
    tokenizer = load_tokenizer(at_hand("tokenizers/smollm2"))
    assert printed(tokenizer, encoded(tokenizer, "👩‍👩‍👧 漢字 é", 0)) == "⟦👩‍👩‍👧 漢字 é⟧\n"


@pytest.mark.parametrize("columns", ["20", "40", "60"])
def test_narrow_terminals_lose_nothing(capfd, config, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    out = shown(capfd, *config([PAIRS[0]] * 12))
    assert all(len(line) <= int(columns) for line in out.splitlines())
    if columns != "20":
        assert "…" not in out


def test_encodings_that_lack_characters(config, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(config([PAIRS[0]])) == 0
    out.flush()
    text = out.buffer.getvalue().decode("ascii")
    assert "^1+1=\\u27e62$\\u27e7" in text
    assert "#" * 40 in text


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page(capfd, config, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # of no matter to the page
    page = tmp_path / "page.html"
    page.write_text("an older one")
    source = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 2}}
    mixed = {"class_path": "MixedRows", "init_args": {"sources": {"<b>&": source}}}
    for _ in range(2):
        shown(capfd, *config(train=mixed), "--output", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    green = next(line for line in text.splitlines() if "background-color: #008000" in line)
    assert green.startswith(".r")
    name = green.partition(" ")[0][1:]
    assert f'<span class="{name}">' in text
    assert "&lt;b&gt;&amp;" in text
    assert "⟦" not in text
    assert "train: 2 rows read" in text
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "rows.jsonl", "config.yaml"}


def test_page_is_whole_where_the_reader_of_the_text_leaves(config, tmp_path, monkeypatch):
    class Left(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return nowhere.fileno()

    args = config([PAIRS[0]])
    nowhere = (tmp_path / "nowhere").open("w")
    monkeypatch.setattr(sys, "stdout", Left())
    with nowhere:
        main([*args, "--output", str(tmp_path / "page.html")])
    assert "train: 1 rows read" in (tmp_path / "page.html").read_text(encoding="utf-8")


# -- one mistake, one message ------------------------------------------------------------------------------------------


def fails(capfd, *args, lines=1):
    status = main(list(args))
    assert status == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert "usage:" not in captured.err
    message = captured.err[captured.err.index("error: ") :].strip()
    assert len(message.splitlines()) == lines, message
    return message.removeprefix("error: ")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--confg", "x.yaml"], "unknown key confg; did you mean config?"),
        (["--row", "1"], "unknown key row"),
        (["--data.max_lenght", "1"], "unknown key data.max_lenght; did you mean data.text.max_length?"),
        (["--config", "nowhere.yaml"], "config: no such file: "),
        (["--rows", "-1"], "--rows must be at least 0, got -1"),
        (["--first", "0"], "--first must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--rows", "all"], "--rows: expected int. Got value: all"),
        (
            ["--split", "valid"],
            "--split: expected one of 'train', 'validation', 'forgetting', 'test', 'predict'",
        ),
        (["--split", "validation"], "data.validation is not set"),
        (["--split", "predict"], "data.predict is not set, nor data.test"),
        (["--first", "2"], "--first: there is no row 2: train has 1 to show"),
        (["--output", "nowhere/page.html"], "--output: no such folder: nowhere"),
        (["--output", "rows.jsonl"], "--output must end in .html, got rows.jsonl"),
        (["--data.batches.packing", "bfd"], "packing needs max_length"),
        (["--data.batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--data.text.tokenizer", "./nowhere"], "data.text.tokenizer: no such folder: ./nowhere"),
        (
            ["--data.text.tokenizer", "null"],
            "data.text.tokenizer is not set, and the model has no name to take it from",
        ),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data.text.max_length", "3"], "data.train: no row has a target left within max_length 3"),
        (["--data.text.chat_template", "{{ nonsense("], "the chat template is broken: "),
    ],
)
def test_mistakes(capfd, config, args, expected):
    assert expected in fails(capfd, *config([PAIRS[0]]), *args)


def test_output_that_is_a_folder(capfd, config, tmp_path):
    (tmp_path / "page.html").mkdir()
    assert "page.html is a folder" in fails(capfd, *config(), "--output", str(tmp_path / "page.html"))


def test_bad_rows(capfd, config):
    message = fails(capfd, *config(), lines=2)
    assert message.splitlines()[0].endswith("rows.jsonl: 1 of 5 rows are bad")
    assert message.splitlines()[1].startswith("  row 3: completion: missing")


def test_no_model_is_given(capfd):
    assert fails(capfd) == "model.model: required, but not given"


def test_help(capfd):
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    assert "FILE.html" in out
    assert "⟦brackets⟧" in out


def test_the_command_comes_here(config, monkeypatch, capfd):
    from dft_lightning.__main__ import run

    monkeypatch.setattr(sys, "argv", ["dft_lightning", "inspect", *config([PAIRS[0]])])
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 0
    assert "^1+1=⟦2$⟧" in capfd.readouterr().out
