"""Rows to messages to tokens with labels to batches."""

from __future__ import annotations

import json
import logging
import os
import shutil

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from conftest import at_hand
from dft_lightning.assets import resolve
from dft_lightning.data import ArithmeticRows, HubRows, InstructionDataModule, LocalRows, arithmetic_tokenizer
from dft_lightning.data.batches.collating import Collator, ItemRows
from dft_lightning.data.batches.sampling import RowSampler
from dft_lightning.data.batches.steps import micro_batches_of
from dft_lightning.data.options import RowOptions, TextOptions
from dft_lightning.data.rows.arithmetic import is_held_out
from dft_lightning.data.rows.forms import Conversation, Reading
from dft_lightning.data.rows.reading import read_messages
from dft_lightning.data.rows.sources import as_source
from dft_lightning.data.text import cache
from dft_lightning.data.text.tokenizer import end_of_turn, load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, GradientRecorder, arithmetic_data, data_options, trainer
from stand_ins import CHATML

TURN = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "See you."},
]


def write(path, rows):
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def encode(tokenizer, messages, **options):
    (rows,) = ConversationEncoder(tokenizer, TextOptions(**options)).encode([Conversation(messages)])
    if isinstance(rows, InputError):
        raise rows
    (row,) = rows
    return row


def trained_text(tokenizer, row):
    return tokenizer.decode([label for label in row.labels if label != -100])


@pytest.fixture
def real_tokenizer(tmp_path):
    """Load a real tokenizer by name; GPT-2's bare vocabulary files are made into a checkpoint folder first."""

    def load(name):
        folder = at_hand(name)
        if name.endswith("gpt2"):
            GPT2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "gpt2")
            folder = tmp_path / "gpt2"
        return load_tokenizer(folder)

    return load


# -- rows to messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"prompt": "1+1=", "completion": "2"}, {}, TURN),
        (
            {"question": "1+1=", "answer": "2", "id": 7},
            {"prompt_column": "question", "completion_column": "answer"},
            TURN,
        ),
        ({"instruction": "1+1=", "input": "", "output": "2"}, {}, TURN),
        ({"instruction": "1+1=", "output": "2"}, {}, TURN),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            {},
            [{"role": "user", "content": "Add.\n\n1+1"}, {"role": "assistant", "content": "2"}],
        ),
        ({"messages": MULTI}, {}, MULTI),
        ({"chat": MULTI}, {"messages_column": "chat"}, MULTI),
        ({"prompt": "no", "completion": "no", "messages": MULTI}, {}, MULTI),
        ({"prompt": "1+1=", "completion": "2", "messages": 3}, {"form": "prompt_completion"}, TURN),
    ],
)
def test_row_forms(tmp_path, suffix, row, columns, expected):
    source = LocalRows(write(tmp_path / f"rows{suffix}", [row, row]))
    assert read_messages(source, Reading(RowOptions(**columns))).messages == [expected, expected]


def test_json_lines_may_hold_unicode_separators_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b", "completion": "c"}\n\n{"prompt": "d", "completion": "e"}\n')
    read = read_messages(LocalRows(path), Reading())
    assert [messages[0]["content"] for messages in read.messages] == ["a\u2028b", "d"]
    assert read.numbers == [1, 3]  # as an editor counts the lines


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "a", "completion": ', "row 2: broken JSON at character 30"),
        ('{"prompt": "a"}', "row 2: completion: missing"),
        ('{"prompt": "a", "completion": null}', "row 2: completion: null"),
        ('{"prompt": true, "completion": "b"}', "row 2: prompt: expected a string, got bool"),
        ('{"prompt": "a", "completion": " "}', "row 2: completion: empty"),
        ("[1]", "row 2: expected an object, got a list"),
        ('{"prompt": "a", "completion": "\\ud83d"}', "row 2: completion: half a surrogate pair at character 0"),
    ],
)
def test_bad_rows_name_file_row_and_column(tmp_path, text, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{text}\n{json.dumps(GOOD)}\n")
    with pytest.raises(InputError) as error:
        read_messages(LocalRows(path), Reading())
    assert str(error.value).splitlines()[0] == f"{path}: 1 of 3 rows are bad"
    assert expected in str(error.value)


def read(path, **options):
    return read_messages(as_source(str(path), "train"), Reading(RowOptions(**options)))


def test_csv_rows_are_text_as_it_stands(tmp_path):
    """Nothing is guessed: no number of 007, no missing value of NA, no row of a quoted line end."""
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeffprompt,completion\r\n007,NA\r\n"two\nlines, ""quoted""",x\u2028y\r\n\r\nlast,1e3'.encode())
    found = read(path)
    assert [[turn["content"] for turn in messages] for messages in found.messages] == [
        ["007", "NA"],
        ['two\nlines, "quoted"', "x\u2028y"],
        ["last", "1e3"],
    ]
    assert found.numbers == [2, 3, 6]  # the lines that they begin in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,completion\na,b\nc\n", "row 3: 1 fields, and the first line names 2 columns"),
        ('prompt,completion\na,b\n"c,d\ne,f\n', "broken CSV in the row that begins in line 3"),
        ("prompt,prompt\na,b\n", "the column 'prompt' is there twice"),
        ("prompt,completion\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_bad_csv(tmp_path, text, expected):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as error:
        read(path)
    assert str(path) in str(error.value)


def test_parquet_and_saved_datasets(tmp_path):
    rows = [{"messages": MULTI}, {"messages": TURN}]
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset, "other": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    for name in ("rows.parquet", "saved", "splits"):
        assert read(tmp_path / name).messages == [MULTI, TURN], name
    other = LocalRows(tmp_path / "splits", split="other")
    assert read_messages(other, Reading()).messages == [TURN]
    with pytest.raises(InputError, match="no split 'nope' there, but 'train', 'other'"):
        read_messages(LocalRows(tmp_path / "splits", split="nope"), Reading())
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="rows.parquet: cannot be read as Parquet"):
        read(tmp_path / "rows.parquet")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(InputError, match="cannot be read as a saved dataset"):
        read(tmp_path / "saved")


def test_a_folder_of_files(tmp_path):
    """In the order of names; what is bad is named with its file."""
    write(tmp_path / "b.jsonl", [GOOD, {"prompt": "a"}])
    (tmp_path / "a.csv").write_text("prompt,completion\nfirst,row\n")
    (tmp_path / "README.md").write_text("no rows")
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert str(error.value).splitlines() == [f"{tmp_path}: 1 of 3 rows are bad", "  row b.jsonl:2: completion: missing"]
    write(tmp_path / "b.jsonl", [GOOD])
    found = read(tmp_path)
    assert [messages[0]["content"] for messages in found.messages] == ["first", "a"]
    assert found.numbers == ["a.csv:2", "b.jsonl:1"]
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(InputError, match="a folder without a .jsonl, .json, .csv, .parquet file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "expected a list of at least one message"),
        ("hello", "expected a list of at least one message"),
        ([{"role": "user", "content": "a"}], "no assistant message"),
        (
            [{"role": "robot", "content": "a"}],
            r"messages\[0\].role: expected one of system, developer, user, assistant, tool, got 'robot'",
        ),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]: expected a part of type text, got 'str'"),
        ([TURN[0], {"role": "assistant", "content": ""}], r"messages\[1\].content: empty"),
        ([TURN[1], *TURN], r"messages\[0\].role: a conversation cannot begin with the assistant"),
        (["hello"], r"messages\[0\]: expected an object with role and content, got str"),
    ],
)
def test_bad_messages(tmp_path, messages, expected):
    with pytest.raises(InputError, match=expected):
        read_messages(LocalRows(write(tmp_path / "rows.jsonl", [{"messages": messages}])), Reading())


def test_ten_bad_rows_are_shown_and_all_are_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD] + [{"prompt": "a"}] * 23)
    with pytest.raises(InputError) as error:
        read_messages(LocalRows(path), Reading())
    lines = str(error.value).splitlines()
    assert lines[0].endswith("23 of 24 rows are bad")
    assert len(lines) == 12
    assert lines[1].strip() == "row 2: completion: missing"
    assert lines[-1].strip() == "... and 13 more"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", None, "no such file"),
        ("rows.txt", "a", r"expected a .jsonl, .json, .csv, .parquet file"),
        ("rows.jsonl", "", "no rows"),
        ("rows.json", "[]", "no rows"),
        ("rows.json", '{"prompt": "a"}', "expected a list of objects, got an object"),
        ("rows.json", '{"a": 1}\n{"a": 2}', "one object a line belongs in a .jsonl file"),
        ("rows.json", "[1,\n", "broken JSON at line 2, character 1"),
        ("rows.jsonl", '{"q": "a", "a": "b"}', r"cannot tell the row form from the columns \['a', 'q'\]"),
    ],
)
def test_bad_files(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=expected) as error:
        read_messages(LocalRows(path), Reading())
    assert str(path) in str(error.value)


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match="row 1: not UTF-8 text: invalid start byte at byte 13"):
        read_messages(LocalRows(path), Reading())


def test_hub_rows_load_a_local_folder_as_they_would_a_hub_name(tmp_path):
    write(tmp_path / "train.jsonl", [GOOD, GOOD])
    rows = list(HubRows(str(tmp_path), split="train").rows())
    assert rows == [(1, GOOD), (2, GOOD)]
    with pytest.raises(InputError, match="no-such-name/train: neither a local file nor a dataset"):
        list(HubRows("no-such-name").rows())


def test_rows_without_an_answer_are_completed_where_the_last_turn_is_learnt(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1+1="}])
    data = InstructionDataModule(
        predict=str(path), text={"tokenizer": "asset://arithmetic-base", "train_turns": "last"}
    )
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["prompt"] == ["^1+1="]


# -- messages to tokens --------------------------------------------------------------------------------------------


def test_arithmetic_row_by_hand():
    row = encode(arithmetic_tokenizer(), TURN)
    # ^ 1 + 1 = 2 $ : the completion and the end of the turn are targets
    assert row.input_ids.tolist() == [1, 5, 14, 5, 15, 6, 2]
    assert row.labels.tolist() == [-100] * 5 + [6, 2]
    assert row.weights is None


def test_train_on_prompts_learns_all_but_the_first_token():
    row = encode(arithmetic_tokenizer(), TURN, prompt_weight=1)
    assert row.labels.tolist() == [-100, *row.input_ids[1:]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", "2<|im_end|>"),
        ("qwen3", "2<|im_end|>"),  # after empty thoughts, which are not learnt
        ("gpt2", "2<|endoftext|>"),
    ],
)
def test_single_turn_mask_on_real_tokenizers(real_tokenizer, name, expected):
    tokenizer = real_tokenizer(f"tokenizers/{name}")
    row = encode(tokenizer, TURN)
    assert trained_text(tokenizer, row) == expected


def test_a_tokenizer_without_a_chat_template_gets_the_plain_one_and_says_so(tmp_path, caplog):
    shutil.copytree(resolve("asset://arithmetic-base"), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(tmp_path / "base")
        load_tokenizer(tmp_path / "base", chat_template="{{ messages[0].content }}")
    assert tokenizer.chat_template is not None
    (said,) = [line for line in caplog.messages if "chat template" in line]
    assert said.startswith(f"{tmp_path / 'base'} has no chat template and gets the plain one")


def test_plain_template_on_a_sentencepiece_tokenizer():
    tokenizer = load_tokenizer(at_hand("models/stories260K"))
    row = encode(tokenizer, TURN)
    assert tokenizer.decode(row.input_ids).endswith("2</s>")
    assert trained_text(tokenizer, row).strip() == "2</s>"


def test_white_space_is_learnt_whatever_offsets_the_tokenizer_gives():
    """Llama 3's and RoBERTa's leave white space out of a token's characters."""
    tokenizer = load_tokenizer(at_hand("tokenizers/smollm2"))
    turns = [TURN[0], {"role": "assistant", "content": "   \n\n  x"}]
    expected = encode(tokenizer, turns).labels.tolist()
    assert tokenizer.decode([label for label in expected if label != -100]).startswith("\n   \n\n  x")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert encode(tokenizer, turns).labels.tolist() == expected


def test_multi_turn_mask_trains_every_assistant_turn():
    tokenizer = load_tokenizer(at_hand("tokenizers/smollm2"))
    row = encode(tokenizer, MULTI)
    assert trained_text(tokenizer, row) == "Hello!<|im_end|>See you.<|im_end|>"
    # pad = eos = the end-of-turn token here, which is trained all the same
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (row.labels == tokenizer.eos_token_id).sum() == 2


def test_template_that_rewrites_earlier_turns_makes_a_row_of_each():
    tokenizer = load_tokenizer(at_hand("tokenizers/qwen3"))
    (rows,) = ConversationEncoder(tokenizer).encode([Conversation(MULTI)])
    assert [trained_text(tokenizer, row) for row in rows] == ["Hello!<|im_end|>", "See you.<|im_end|>"]
    assert trained_text(tokenizer, encode(tokenizer, MULTI, train_turns="last")) == "See you.<|im_end|>"


def test_generation_prompt_is_what_training_rows_begin_with(real_tokenizer):
    for name in ("tokenizers/smollm2", "tokenizers/qwen3", "tokenizers/gpt2", "models/stories260K"):
        tokenizer = real_tokenizer(name)
        text, ids = ConversationEncoder(tokenizer).prompt(Conversation(TURN))
        assert encode(tokenizer, TURN).input_ids[: len(ids)].tolist() == ids, name
        assert "1+1=" in text


def test_end_of_turn_token():
    assert end_of_turn(arithmetic_tokenizer()) == ("$", 2)
    smollm2 = load_tokenizer(at_hand("tokenizers/smollm2"))
    assert end_of_turn(smollm2) == ("<|im_end|>", smollm2.eos_token_id)


def test_tokenizer_problems_are_named(tmp_path):
    with pytest.raises(InputError, match=r"data.text.tokenizer: cannot load the tokenizer of 'no/such'"):
        load_tokenizer("no/such")
    with pytest.raises(InputError, match=r"model.model: no such folder: ./no/such"):
        load_tokenizer("./no/such", key="model.model")
    for template, expected in (
        ("{% foo %}", "the chat template is broken"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
        ("{{ raise_exception('no') }}", "the chat template is broken: no"),
    ):
        with pytest.raises(InputError, match=expected):
            end_of_turn(load_tokenizer("asset://arithmetic-base", chat_template=template))
    with pytest.raises(InputError, match="no such file: nope.jinja"):
        load_tokenizer("asset://arithmetic-base", chat_template="nope.jinja")
    with pytest.raises(InputError, match=r"no such asset; the package has asset://arithmetic-base"):
        load_tokenizer("asset://nope")


def test_generation_starts_after_the_last_question():
    encoder = ConversationEncoder(arithmetic_tokenizer())
    asked = [*TURN, {"role": "user", "content": "2+2="}]
    assert encoder.prompt(Conversation(asked))[0] == "^1+1=2$^2+2="
    assert encoder.prompt(Conversation([*asked, TURN[1]]))[0] == "^1+1=2$^2+2="


# -- special tokens that rows spell --------------------------------------------------------------------------------

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def bytes_tokenizer(special=CONTROL):
    """Bytes, ``<|endoftext|>`` among them as in GPT-NeoX's, and then added tokens, of which some are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([CONTROL[0], *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for text in (CONTROL[0], "    ", *CONTROL[1:], "  "):
        backend.add_tokens([AddedToken(text, special=text in special, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=CONTROL[0])
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("special", [CONTROL, CONTROL[:1]], ids=["all", "not the end of a turn"])
def test_what_a_row_spells_changes_no_other_token(special):
    tokenizer = bytes_tokenizer(special)
    answer = {"role": "assistant", "content": "    x  y"}
    spelled = "".join(text for text in CONTROL if text in (*special, "<|im_end|>"))
    row = encode(tokenizer, [{"role": "user", "content": f"a{spelled}b"}, answer])
    plain = encode(tokenizer, [{"role": "user", "content": "ab"}, answer])
    ids, expected = row.input_ids.tolist(), plain.input_ids.tolist()
    place = expected.index(tokenizer.convert_tokens_to_ids("b"))
    assert ids[:place] == expected[:place]
    assert ids[place - len(expected) :] == expected[place:]
    assert row.labels.tolist()[place - len(expected) :] == plain.labels.tolist()[place:]
    assert tokenizer.decode(ids[place : place - len(expected)]) == spelled
    assert len(ids) == len(expected) + len(spelled)  # one byte a token


def test_special_tokens_in_tools_and_calls_are_text():
    tokenizer = bytes_tokenizer()
    parameters = {"role": {"description": "<|im_end|>"}, "<|im_start|>": {"type": "string"}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"role": "<|im_end|>", "<|im_end|>": 1}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ((row,),) = ConversationEncoder(tokenizer).encode([Conversation(turns, tools)])
    for text in CONTROL[1:]:
        assert row.input_ids.tolist().count(tokenizer.convert_tokens_to_ids(text)) == 2, text


# -- the data module -----------------------------------------------------------------------------------------------


def arithmetic(rows=6, **options):
    data = InstructionDataModule(
        ArithmeticRows(rows, seed=1), **data_options(tokenizer="asset://arithmetic-base", **options)
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_truncation_and_dropped_rows_are_counted(tmp_path):
    rows = [
        {"prompt": "1+1=", "completion": "2"},  # 7 tokens
        {"prompt": "1+1=", "completion": "222222"},  # 12 tokens, cut to 8
        {"prompt": "11111111+1=", "completion": "2"},  # no target within 8
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    data = InstructionDataModule(
        str(path), batch_size=3, text={"tokenizer": "asset://arithmetic-base", "max_length": 8}
    )
    data.prepare_data()
    counts = data.splits.counts["train"]
    assert (counts.rows, counts.dropped) == (3, 1)
    assert counts.truncated == 1
    assert sorted(len(ids) for ids in data.splits.tokenized("train")["input_ids"]) == [7, 8]
    with pytest.raises(InputError, match="no row has a target left within max_length 3"):
        InstructionDataModule(str(path), text={"tokenizer": "asset://arithmetic-base", "max_length": 3}).prepare_data()


def test_tokenised_once(monkeypatch, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "77+1=", "completion": "78"}])
    options = {"tokenizer": "asset://arithmetic-base"}
    calls = []
    encode = ConversationEncoder.encode
    monkeypatch.setattr(ConversationEncoder, "encode", lambda *args: calls.append(1) or encode(*args))
    InstructionDataModule(str(path), **data_options(**options)).prepare_data()
    InstructionDataModule(str(path), **data_options(**options)).prepare_data()
    assert len(calls) == 1
    InstructionDataModule(str(path), **data_options(prompt_weight=1.0, **options)).prepare_data()
    assert len(calls) == 2
    write(path, [{"prompt": "77+2=", "completion": "79"}])
    InstructionDataModule(str(path), **data_options(**options)).prepare_data()
    assert len(calls) == 3


def test_a_cached_file_that_is_cut_between_stretches_is_refused(tmp_path):
    """As is any other, but Arrow takes it for whole."""
    import pyarrow

    path = write(tmp_path / "rows.jsonl", [GOOD] * 400)
    data = InstructionDataModule(str(path), text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    cached = data.splits.tokenized("train").cache_files[0]["filename"]
    with pyarrow.ipc.open_stream(cached) as stream:
        stretches = list(stream)
    assert len(stretches) == 2
    os.remove(cached)  # it is mapped
    with pyarrow.ipc.new_stream(cached, stretches[0].schema) as stream:
        stream.write_batch(stretches[0])
    with pytest.raises(InputError, match=r"\.arrow: has 250 rows of 400: delete it"):
        InstructionDataModule(str(path), text={"tokenizer": "asset://arithmetic-base"}).setup("fit")


def test_two_writers_of_one_entry_leave_it_whole(tmp_path, monkeypatch):
    """Of one process id, as on two machines that share the folder."""

    def load():
        data = InstructionDataModule(str(path), text={"tokenizer": "asset://arithmetic-base"})
        data.setup("fit")
        return len(data.splits.tokenized("train"))

    def encode(*args):
        monkeypatch.setattr(cache, "encoded", alone)
        assert load() == 7
        return alone(*args)

    path = write(tmp_path / "rows.jsonl", [GOOD] * 7)
    alone = cache.encoded
    monkeypatch.setattr(cache, "encoded", encode)
    assert load() == load() == 7


def test_rows_that_moved_have_their_new_numbers(tmp_path):
    for blank in ("", "\n\n"):
        path = tmp_path / "rows.jsonl"
        path.write_text(blank + json.dumps(GOOD))
        data = InstructionDataModule(str(path), text={"tokenizer": "asset://arithmetic-base"})
        data.setup("fit")
        assert data.splits.tokenized("train")["number"][0] == str(1 + len(blank))


def test_changed_special_tokens_are_tokenised_anew(tmp_path, real_tokenizer):
    """The plain template names the end-of-text token; the template's text stays the same when that changes."""
    real_tokenizer("tokenizers/gpt2")
    config = tmp_path / "gpt2" / "tokenizer_config.json"
    ends = []
    for eos in ("<|endoftext|>", "!"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": eos}))
        data = InstructionDataModule(ArithmeticRows(1), text={"tokenizer": str(tmp_path / "gpt2")})
        data.prepare_data()
        ends.append(data.splits.tokenized("train")["labels"][0][-1])
        assert ends[-1] == data.tokenizer.eos_token_id
    assert ends[0] != ends[1]


def test_rows_too_long_to_learn_from_are_still_tested(tmp_path):
    rows = [{"prompt": "1+1" * 9 + "=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}]
    path = str(write(tmp_path / "rows.jsonl", rows))
    data = InstructionDataModule(test=path, text={"tokenizer": "asset://arithmetic-base", "max_length": 10})
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["index"].tolist() == [0, 1]
    assert batch["prompt"] == ["^" + row["prompt"] for row in rows]
    assert data.answers("test") == ["2", "2"]


def test_rows_that_cannot_be_scored_are_bad_rows_of_test(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", [{"messages": [*TURN, TURN[0]]}]))
    with pytest.raises(InputError, match=r"row 1: messages: must end in an assistant message"):
        InstructionDataModule(test=path, text={"tokenizer": "asset://arithmetic-base"}).setup("test")
    InstructionDataModule(path, text={"tokenizer": "asset://arithmetic-base"}).setup("fit")


def test_rows_a_template_cannot_mask_are_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": TURN}, {"messages": MULTI}])
    thinks = CHATML + "{{ '<think>' if add_generation_prompt and messages | length > 2 }}"
    data = InstructionDataModule(
        str(path), text={"tokenizer": str(at_hand("tokenizers/qwen3")), "chat_template": thinks}
    )
    with pytest.raises(InputError) as error:
        data.prepare_data()
    assert str(error.value).splitlines()[0] == f"{path}: 1 of 2 rows are bad"
    assert "row 2: the chat template cannot be masked exactly" in str(error.value)


def test_seeded_split_is_disjoint_and_complete():
    data = arithmetic(20, validation_fraction=0.25)
    train, validation = (
        {tuple(ids) for ids in data.splits.tokenized(name)["input_ids"]} for name in ("train", "validation")
    )
    assert (len(train), len(validation)) == (15, 5)
    assert not train & validation
    again = arithmetic(20, validation_fraction=0.25)
    assert again.splits.tokenized("validation")["input_ids"][:] == data.splits.tokenized("validation")["input_ids"][:]
    other = arithmetic(20, validation_fraction=0.25, seed=1)
    assert other.splits.tokenized("validation")["input_ids"][:] != data.splits.tokenized("validation")["input_ids"][:]


def test_rows_that_are_divided_are_read_once():
    reads = []

    class Counted(ArithmeticRows):
        def rows(self):
            reads.append(1)
            return super().rows()

    data = InstructionDataModule(Counted(8), validation_fraction=0.25, text={"tokenizer": "asset://arithmetic-base"})
    data.prepare_data()
    data.setup("fit")
    assert len(reads) == 1
    assert (len(data.splits.tokenized("train")), len(data.splits.tokenized("validation"))) == (6, 2)


def test_bad_sources_are_named():
    with pytest.raises(InputError, match="data.train is not set"):
        InstructionDataModule(text={"tokenizer": "asset://arithmetic-base"}).prepare_data()
    with pytest.raises(InputError, match=r"data.text.tokenizer is not set"):
        InstructionDataModule(ArithmeticRows(2)).prepare_data()
    with pytest.raises(InputError, match="data.validation is not set"):
        InstructionDataModule("a.jsonl", text={"tokenizer": "asset://arithmetic-base"}).setup("validate")
    with pytest.raises(InputError, match="data.predict is not set, nor data.test"):
        InstructionDataModule("a.jsonl", text={"tokenizer": "asset://arithmetic-base"}).setup("predict")
    with pytest.raises(ValueError, match="not both"):
        InstructionDataModule("a.jsonl", validation="b.jsonl", validation_fraction=0.1)
    for options in ({"num_proc": -1}, {"num_workers": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            InstructionDataModule("a.jsonl", **data_options(**options))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        InstructionDataModule("a.jsonl", batch_size=0)


def test_batches_are_padded_on_the_right_and_prompts_on_the_left():
    rows = [
        {
            "input_ids": [5, 6, 7],
            "labels": [-100, 6, 7],
            "index": 0,
            "prompt": "a",
            "prompt_ids": [5],
            "answer": "b",
        },
        {"input_ids": [8], "labels": [-100], "index": 1, "prompt": "c", "prompt_ids": [8, 9], "answer": None},
    ]
    batch = Collator(pad_token_id=0, pad_to_multiple_of=4, with_prompts=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100] * 4]
    assert batch["prompt_input_ids"].tolist() == [[0, 0, 0, 5], [0, 0, 8, 9]]
    assert batch["prompt_attention_mask"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert batch["answer"] == ["b", None]


@pytest.mark.parametrize(("size", "ranks"), [(8, 1), (8, 2), (7, 2), (10, 4)])
def test_rows_are_shared_out_once_and_in_the_same_order(size, ranks):
    dataset = ItemRows([{"input_ids": [1], "labels": [-100]}] * size, pad_token_id=0)

    def order(num_replicas, rank, epoch):
        sampler = RowSampler(dataset, num_replicas, rank, shuffle=True, seed=5)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    alone = order(1, 0, 0)
    assert sorted(alone) == list(range(size))
    assert order(1, 0, 1) != alone
    shares = [order(ranks, rank, 0) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    together = [index for step in zip(*shares, strict=True) for index in step]
    assert together[:size] == alone
    assert together[size:] == [-1] * (len(together) - size)
    assert dataset[-1]["labels"] == [-100, -100]


def test_pad_token_missing(real_tokenizer, tmp_path):
    """Llama-3 and GPT-2 have no pad token; padding is masked, so any id will do."""
    assert real_tokenizer("tokenizers/gpt2").pad_token is None
    rows = ArithmeticRows(5, min_digits=1)
    data = InstructionDataModule(rows, batch_size=5, text={"tokenizer": str(tmp_path / "gpt2")})
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]).any()


# -- generated arithmetic ------------------------------------------------------------------------------------------


def test_arithmetic_is_right_deterministic_and_held_out():
    rows = [row for _, row in ArithmeticRows(300, min_digits=1, max_digits=6, seed=4).rows()]
    assert rows == [row for _, row in ArithmeticRows(300, min_digits=1, max_digits=6, seed=4).rows()]
    for row in rows:
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert int(row["completion"].split("|")[1]) == a + b
        assert not is_held_out(a, b)
    held_out = ArithmeticRows(50, part="held_out", seed=4).rows()
    assert all(is_held_out(*map(int, row["prompt"].rstrip("=").split("+"))) for _, row in held_out)


def test_noise_is_a_share_of_the_steps():
    clean = [row for _, row in ArithmeticRows(2000, min_digits=4, max_digits=4, seed=1).rows()]
    assert all(str(eval(row["prompt"].rstrip("="))) == row["completion"].split("|")[1] for row in clean)
    noisy = [row for _, row in ArithmeticRows(2000, min_digits=4, max_digits=4, noise=0.1, seed=1).rows()]
    wrong_steps = wrong_rows = 0
    for row in noisy:
        steps, answer = row["completion"].split("|")
        digits = []
        for step in steps.split(","):
            left, right = step.split("=")
            wrong_steps += eval(left) % 10 != int(right.split("c")[0])
            digits.append(right[0])
        assert answer.endswith("".join(reversed(digits)))  # the answer repeats what was written
        wrong_rows += int(answer) != eval(row["prompt"].rstrip("="))
    assert wrong_steps / 8000 == pytest.approx(0.1, abs=0.015)
    assert wrong_rows / 2000 == pytest.approx(1 - 0.9**4, abs=0.04)


@pytest.mark.parametrize(
    "options",
    [{"num_rows": 0}, {"min_digits": 3, "max_digits": 2}, {"noise": 1.5}, {"part": "x"}, {"digit_weights": [1.0]}],
)
def test_bad_arithmetic_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ArithmeticRows(**{"num_rows": 3, **options})


def test_shipped_tokenizer_is_the_one_the_code_makes():
    shipped = load_tokenizer("asset://arithmetic-base")
    made = arithmetic_tokenizer()
    assert shipped.get_vocab() == made.get_vocab()
    assert shipped.chat_template == made.chat_template
    assert torch.equal(torch.tensor(shipped("1+2=?x")["input_ids"]), torch.tensor(made("1+2=?x")["input_ids"]))


# -- rows of an optimizer step ----------------------------------------------------------------------------------------


def test_global_batch_size_sets_the_accumulation():
    """12 rows a step in micro-batches of 3: the gradient of one batch of 12."""
    gradients = []
    for options in ({"batch_size": 3, "global_batch_size": 12}, {"batch_size": 12}):
        pl.seed_everything(0)
        module = GradientRecorder(TINY_ARITHMETIC, loading={"dtype": "float64"})
        run = trainer()
        run.fit(module, datamodule=arithmetic_data(24, shuffle=False, **options))
        gradients.append(module.gradients[0])
        assert run.accumulate_grad_batches == 12 // options["batch_size"]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("size", "batch_size", "ranks", "nearest"), [(100, 8, 4, 96), (112, 8, 4, 128), (5, 8, 4, 32), (7, 2, 1, 8)]
)
def test_a_global_batch_size_that_does_not_divide(size, batch_size, ranks, nearest):
    with pytest.raises(InputError, match=rf"{size} rows are no whole number .* {nearest} is the nearest size that is"):
        micro_batches_of(size, batch_size, ranks)
    assert micro_batches_of(nearest, batch_size, ranks) * batch_size * ranks == nearest


def test_a_global_batch_size_beside_another_accumulation():
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 2})
    for options, given in (({"accumulate_grad_batches": 3}, "3"), ({"callbacks": [scheduler]}, "a Gradient")):
        data = arithmetic_data(8, batch_size=2, global_batch_size=4)
        with pytest.raises(InputError, match=rf"accumulate_grad_batches is {given}.*leave one of the two out"):
            trainer(**options).fit(GradientRecorder(TINY_ARITHMETIC), datamodule=data)


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_bytes_and_offsets_find_the_same_tokens(name):
    """On many scripts, on what a tokenizer normalises (Qwen's composes e and its accent), and on white space."""
    tokenizer = load_tokenizer(at_hand(f"tokenizers/{name}"))
    fast, slow = ConversationEncoder(tokenizer), ConversationEncoder(tokenizer)
    slow._byte_level = None
    assert fast._byte_level is not None
    texts = [
        "plain",
        "  two  spaces\n\n",
        "é e\u0301 ü",
        "漢字とかな",
        "🙂👩‍👩‍👧",
        "a\u2028b\tc",
        "\u0958\u0344x",
        "1234567",
        "ﬁ ½",
    ]
    rows = [
        Conversation([{"role": "user", "content": a}, {"role": "assistant", "content": b}])
        for a in texts
        for b in texts
    ]
    asked = []
    encode_all = fast._encode_all
    fast._encode_all = lambda found: asked.extend(found) or encode_all(found)
    for (one,), (other,) in zip(fast.encode(rows), slow.encode(rows), strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
    assert len(asked) == 0 if name == "smollm2" else 0 < len(asked) < len(rows)


@pytest.mark.parametrize(
    "inside",
    [
        "{{ m.content | trim }}",
        "{% if m['content'] %}a{% endif %}{{ m.content }}",
        "{{ m.content if 'x' in m.content else 'y' }}",
        "{% set c = m.content %}{{ c }}",
        "{% set o = m %}{{ o.content }}",
        "{{ m }}",
        "{{ m | tojson }}",
        "{{ m.content ~ (messages | length) }}",
        "{{ m[key] }}",
        "{{ messages[-1].content.split('x')[0] }}",
        "{{ strftime_now('%H') + m.content }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ m.content[:3] }}",
        "{{ say(m) }}",
        "{{ m.get('content') }}",
        "{{ m.values() | join }}",
        "{% for key in m %}{{ key }}{% endfor %}",
        "{% filter trim %}{{ m.content }}{% endfilter %}",
        "{% set c %}{{ m.content }}{% endset %}{{ c | trim }}",
        "{% macro say() %}{{ caller() }}{% endmacro %}{% call say() %}{{ m.content }}{% endcall %}",
        "{% autoescape true %}{{ m.content }}{% endautoescape %}",
        "{% for x in [m] %}{{ x.content | trim }}{% endfor %}",
        "{{ loop.nextitem }}",
        "{{ (messages | last).content | trim }}",
        "{{ [m.content] | first }}",
        "{{ '%s' % m.content }}",
        "{{ -m.content }}",
        "{% with c = m.content %}{{ c }}{% endwith %}",
        "{% include 'x' %}",
        "{{ 'ab' | random }}",
    ],
)
def test_templates_that_may_read_contents_are_told(inside):
    from dft_lightning.data.text.template_source import copies_contents

    assert copies_contents("{% for m in messages %}{{ '<' + m.role + m['content'] ~ messages[0].role }}{% endfor %}")
    assert copies_contents("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}")
    assert copies_contents("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert not copies_contents("{% for m in messages %}{{ m.role }}" + inside + "{% endfor %}")
