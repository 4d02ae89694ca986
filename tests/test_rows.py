"""The forms of rows, their weights, prompts common to all, mixtures, and rows that are skipped."""

from __future__ import annotations

import json
import warnings
from itertools import islice

import pytest
import torch
from datasets import Dataset

from conftest import at_hand
from dft_lightning import CausalLMModule
from dft_lightning.data import ArithmeticRows, InstructionDataModule, LocalRows, MixedRows
from dft_lightning.data.options import RowOptions, TextOptions
from dft_lightning.data.rows.forms import Conversation, Reading
from dft_lightning.data.rows.reading import read_messages
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, GradientRecorder, data_options, trainer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def read(tmp_path, *rows, last_turn="any", unsigned="", **columns):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_messages(LocalRows(path), Reading(RowOptions(**columns), last_turn, unsigned))


def one(tmp_path, row, **options):
    (conversation,) = read(tmp_path, row, **options)
    return conversation


def unlearnt(message):
    return {**message, "weight": 0.0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            [USER, ANSWER],
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            [{"role": "system", "content": "Be brief."}, USER, ANSWER],
        ),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "3"},
                ANSWER,
            ],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]}, [USER, ANSWER]),
        (
            {"messages": [USER, {**ANSWER, "reasoning_content": "so", "name": None}]},
            [USER, {**ANSWER, "reasoning_content": "so"}],
        ),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, [USER, ANSWER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": "Hi", "chosen": [ANSWER], "rejected": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"prompt": [USER, ANSWER, USER], "chosen": [USER, ANSWER, USER, ANSWER]},
            [USER, unlearnt(ANSWER), USER, ANSWER],
        ),
        ({"chosen": [USER, ANSWER, USER, ANSWER], "rejected": []}, [USER, unlearnt(ANSWER), USER, ANSWER]),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, [USER, unlearnt(ANSWER), USER, ANSWER]),
        ({"prompt": [USER], "completion": "Hello"}, [USER, ANSWER]),
    ],
)
def test_forms(tmp_path, row, expected):
    assert one(tmp_path, row).messages == expected


def test_tools_and_their_calls(tmp_path):
    """Arguments become objects, which templates take, whether the row has them as such or as OpenAI's strings."""
    called = {"id": "1", **CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [called]}]
    turns += [{"role": "tool", "tool_call_id": "1", "content": "3"}, ANSWER]
    for tools in (TOOLS, json.dumps(TOOLS)):
        found = one(tmp_path, {"messages": turns, "tools": tools})
        assert found.tools == TOOLS
        assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]}
        assert found.messages[2] == {"role": "tool", "tool_call_id": "1", "content": "3"}


TOOL_TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_are_learnt_and_tool_answers_are_not(tmp_path):
    tokenizer = load_tokenizer(at_hand("tokenizers/smollm2"), chat_template=TOOL_TEMPLATE)
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ANSWER]
    found = one(tmp_path, {"messages": turns, "tools": TOOLS})
    ((row,),) = ConversationEncoder(tokenizer).encode([found])
    text = tokenizer.decode(row.input_ids)
    learnt = tokenizer.decode([label for label in row.labels if label != -100])
    assert text.startswith(json.dumps(TOOLS))
    assert "<|im_start|>tool\n3<|im_end|>" in text
    assert learnt == '{"name": "add", "arguments": {"a": 1, "b": 2}}<|im_end|>Hello<|im_end|>'


def test_arrow_fills_keys_that_other_messages_have(tmp_path):
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    Dataset.from_list([{"messages": [*turns, ANSWER]}]).to_parquet(tmp_path / "rows.parquet")
    (found,) = read_messages(LocalRows(tmp_path / "rows.parquet"), Reading())
    assert found.messages[0] == USER
    assert found.messages[2] == ANSWER


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "a text"}, {}, Conversation([], text="a text")),
        ({"body": "a text", "weight": 2}, {"text_column": "body"}, Conversation([], text="a text", weight=2.0)),
    ],
)
def test_plain_text(tmp_path, row, options, expected):
    assert one(tmp_path, row, **options) == expected


def test_plain_text_is_learnt_whole_with_its_end():
    """stories260K puts <s> before a text, which nothing predicts; GPT-2 has no such token."""
    tokenizer = load_tokenizer(at_hand("models/stories260K"))
    ((row,),) = ConversationEncoder(tokenizer).encode([Conversation([], text="Once upon a time")])
    expected = [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]
    assert row.input_ids.tolist() == expected
    assert row.labels.tolist() == [-100, *expected[1:]]
    ((weighed,),) = ConversationEncoder(tokenizer).encode([Conversation([], text="Once upon a time", weight=0.5)])
    assert weighed.weights.tolist() == [0] + [0.5] * (len(expected) - 1)


def test_plain_text_has_nothing_to_generate_from(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "1+1="}\n' * 4)
    data = InstructionDataModule(str(path), str(path), str(path), text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    with pytest.raises(InputError, match=r"data.validation: plain text has no prompt to generate from"):
        data.generation_dataloader()
    with pytest.raises(InputError, match=r"row 1: text: plain text has no prompt to complete"):
        data.setup("predict")


# -- weights ---------------------------------------------------------------------------------------------------------


def test_weights_of_rows_and_messages_multiply(tmp_path):
    turns = [USER, {**ANSWER, "weight": 0.5}, {**USER, "weight": 3}, ANSWER, USER, {**ANSWER, "weight": 0}]
    found = one(tmp_path, {"messages": turns, "weight": 4})
    assert [message.get("weight") for message in found.messages] == [None, 2, None, 4, None, 0]
    assert "weight" not in one(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0.25}], "weight": 4}).messages[1]
    assert one(tmp_path, {"prompt": "a", "completion": "b", "importance": "0.5"}, weight_column="importance").messages[
        1
    ] == {
        "role": "assistant",
        "content": "b",
        "weight": 0.5,
    }


def test_weights_lie_on_the_tokens_of_their_turn():
    tokenizer = load_tokenizer("asset://arithmetic-base")
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "22", "weight": 0.5}]
    turns += [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4", "weight": 0.0}]
    turns += [{"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}]
    ((row,),) = ConversationEncoder(tokenizer).encode([Conversation(turns)])
    # ^ 1 2 2 $ ^ 3 4 $ ^ 5 6 $
    assert row.weights.tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 1, 1]
    assert [label != -100 for label in row.labels] == [weight > 0 for weight in row.weights]
    ((last,),) = ConversationEncoder(tokenizer, TextOptions(train_turns="last")).encode([Conversation(turns)])
    assert last.weights is None  # all are 1
    assert [label != -100 for label in last.labels] == [False] * 11 + [True] * 2
    ((learnt,),) = ConversationEncoder(tokenizer, TextOptions(prompt_weight=1)).encode([Conversation(turns[:2])])
    assert learnt.weights.tolist() == [0, 1, 0.5, 0.5, 0.5]


def test_weights_reach_the_batches(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "1+1=", "completion": "2", "weight": 0.5}, {"prompt": "1+1=", "completion": "2"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    for options in ({}, {"packing": "bfd", "max_length": 20}, {"padding_free": True}):
        data = InstructionDataModule(
            str(path), batch_size=2, **data_options(tokenizer="asset://arithmetic-base", **options)
        )
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert sorted(batch["token_weight"][batch["labels"] != -100].tolist()) == [0.5, 0.5, 1, 1], options


PAIR = {"prompt": "1+1=", "completion": "2"}


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"reward": 0.5}, {}, 0.5),
        ({"reward": 1.0}, {}, None),
        ({"advantage": "-1.5"}, {}, -1.5),
        ({"weight": None, "reward": None, "advantage": 2}, {}, 2.0),
        ({"reward": 3, "weight": 0.25}, {"weight_column": "weight"}, 0.25),
        ({"reward": "good"}, {"weight_column": "weight"}, None),
        ({"weight": 3, "advantage": -2}, {"weight_column": "advantage"}, -2.0),
    ],
)
def test_a_row_is_weighted_by_its_reward_or_advantage(tmp_path, row, columns, expected):
    assert one(tmp_path, {**PAIR, **row}, **columns).messages[1].get("weight") == expected


def test_an_advantage_multiplies_the_messages_weights(tmp_path):
    turns = [USER, {**ANSWER, "weight": 0.5}, USER, ANSWER, USER, {**ANSWER, "weight": 0}]
    found = one(tmp_path, {"messages": turns, "advantage": -4}).messages
    assert [message.get("weight") for message in found] == [None, -2, None, -4, None, 0]
    assert one(tmp_path, {"text": "1+1=2", "advantage": -1}).weight == -1


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"weight": 1, "reward": 1},
            {},
            "row 1: weight and reward: two weights of one row: name the column to take by",
        ),
        ({"reward": 0, "advantage": 0}, {}, "reward and advantage: two weights of one row"),
        ({"reward": -1}, {}, "reward: expected a number from 0 to 3.4e38, got -1; only an advantage may be negative"),
        ({"reward": "good"}, {}, "got 'good'; .*is left alone with data.rows.weight_column: weight"),
        ({"advantage": 4e38}, {}, "advantage: expected a number from -3.4e38 to 3.4e38, got 4e"),
        ({"advantage": float("nan")}, {}, "advantage: expected a number from -3.4e38"),
        ({"weight": -1}, {}, "weight: expected a number from 0 to 3.4e38, got -1$"),
        ({"mine": -1}, {"weight_column": "mine"}, "mine: expected a number from 0 to 3.4e38, got -1$"),
        (
            {"advantage": -1},
            {"unsigned": "model.step.renormalize divides by the sum of the weights"},
            "advantage: -1, and model.step.renormalize divides by the sum of the weights",
        ),
    ],
)
def test_weights_that_are_refused(tmp_path, row, columns, expected):
    with pytest.raises(InputError, match=expected):
        read(tmp_path, {**PAIR, **row}, **columns)


@pytest.mark.parametrize("prompt", ["1+1=", [USER]])
def test_an_answer_of_no_weight_may_be_empty(tmp_path, prompt):
    """As a model's may be; it is not learnt, and to score or to be scored against it is still a bad row."""
    assert [m["role"] for m in one(tmp_path, {"prompt": prompt, "completion": "", "reward": 0}).messages] == ["user"]
    for reward, last_turn in ((1, "any"), (0, "assistant")):
        with pytest.raises(InputError, match="completion: empty"):
            read(tmp_path, {"prompt": prompt, "completion": "", "reward": reward}, last_turn=last_turn)


def test_what_weights_the_rows_is_said_once(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = [{**PAIR, "reward": reward} for reward in (1.0, 0.0, 0.5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    said = []
    for place in ("splits", "batches.stream_position"):
        monkeypatch.setattr(f"dft_lightning.data.{place}.rank_zero_info", said.append)
    data = InstructionDataModule(str(path), batch_size=1, text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    expected = "the column reward weights the rows' losses (another by data.rows.weight_column)"
    assert said[1:] == [f"{path}: {expected.replace('reward', 'reward (3 rows)')}"]
    assert (data.splits.counts["train"].rows, data.splits.counts["train"].dropped) == (3, 1)
    said.clear()
    data = InstructionDataModule(str(path), batch_size=1, streaming={}, text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    for batch, _ in zip(data.train_dataloader(), range(3), strict=False):
        data.on_before_batch_transfer(batch, 0)
    assert said == [f"data.train: {expected}"]


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "DFTLoss"])
@pytest.mark.parametrize("head", ["fused", "full"])
def test_gradients_of_rewards_and_advantages_by_hand(tmp_path, loss, head):
    """In float64, from the model's own logits: a row of reward 0 is not there, one of advantage -1 is subtracted."""
    rows = [
        {"prompt": "1+1=", "completion": "2", "reward": 0.5},
        {"prompt": "12+3=", "completion": "15", "reward": 0},
        {"prompt": "2+2+2=", "completion": "6=6", "advantage": -1},
        {"prompt": "4+4=", "completion": "88"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = GradientRecorder(
        TINY_ARITHMETIC, loss={"class_path": f"dft_lightning.{loss}"}, loading={"dtype": "float64", "head": head}
    )
    module.rounded = torch.float64
    module.configure_model()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    data = InstructionDataModule(
        str(tmp_path / "rows.jsonl"),
        batch_size=2,
        text={"tokenizer": "asset://arithmetic-base"},
        batches={"shuffle": False},
    )
    trainer(accumulate_grad_batches=2).fit(module, datamodule=data)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    total, targets = 0.0, 0
    for row, weight in ((rows[0], 0.5), (rows[2], -1.0), (rows[3], 1.0)):
        text = f"^{row['prompt']}{row['completion']}$"
        ids = torch.tensor([data.tokenizer.convert_tokens_to_ids(list(text))])
        log_prob = module.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        learnt = log_prob[len(row["prompt"]) :]
        per_token = -learnt * (learnt.detach().exp() if loss == "DFTLoss" else 1)
        total, targets = total + weight * per_token.sum(), targets + len(learnt)
    (total / targets).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    assert targets == 2 + 4 + 3
    torch.testing.assert_close(module.gradients[0], expected, rtol=1e-9, atol=1e-12)


def test_renormalize_takes_no_negative_weights(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**PAIR, "advantage": -1}))
    for streaming in (False, True):
        data = InstructionDataModule(
            str(tmp_path / "rows.jsonl"),
            batch_size=1,
            streaming={} if streaming else None,
            text={"tokenizer": "asset://arithmetic-base"},
        )
        module = CausalLMModule(TINY_ARITHMETIC, step={"renormalize": True})
        with pytest.raises(InputError, match="row 1: .*-1, and model.step.renormalize divides by the sum of the"):
            trainer().fit(module, datamodule=data)
    data = InstructionDataModule(
        str(tmp_path / "rows.jsonl"), batch_size=1, text={"tokenizer": "asset://arithmetic-base"}
    )
    trainer().fit(CausalLMModule(TINY_ARITHMETIC), datamodule=data)


# -- prompts common to all -------------------------------------------------------------------------------------------


def test_system_prompt_and_suffix_are_the_same_in_training_and_generation(tmp_path):
    options = {"system_prompt": "Be exact.", "prompt_suffix": "\nPut it in \\boxed{}."}
    found = one(tmp_path, {"prompt": "1+1", "completion": "2"}, **options)
    assert found.messages == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "1+1\nPut it in \\boxed{}."},
        {"role": "assistant", "content": "2"},
    ]
    own = one(tmp_path, {"messages": [{"role": "system", "content": "Mine."}, USER, ANSWER, USER, ANSWER]}, **options)
    assert own.messages[0]["content"] == "Mine."
    assert [m["content"].endswith("\\boxed{}.") for m in own.messages] == [False, True, False, True, False]
    asked = one(tmp_path, {"prompt": "1+1"}, last_turn="optional", **options)
    encoder = ConversationEncoder(load_tokenizer("asset://arithmetic-base", chat_template=CHAT))
    assert encoder.prompt(asked) == encoder.prompt(found)


CHAT = "{% for m in messages %}{{ m.content + ('$' if m.role == 'assistant' else '=') }}{% endfor %}"


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_without_weights_has_every_row_once():
    parts = {"a": ArithmeticRows(3, seed=1), "b": ArithmeticRows(2, seed=2)}
    found = list(MixedRows(parts).rows())
    assert [number for number, _ in found] == ["a:1", "a:2", "a:3", "b:1", "b:2"]
    assert [row for _, row in found] == [row for part in parts.values() for _, row in part.rows()]


def test_a_mixture_is_drawn_by_weight_and_seed():
    parts = {"a": ArithmeticRows(3000, seed=1), "b": ArithmeticRows(3000, seed=2), "c": ArithmeticRows(1)}
    weights = {"a": 3, "b": 1, "c": 0}

    def drawn(**options):
        return [part for part, _, _ in islice(MixedRows(parts, weights, **options).rows_of_parts(), 3000)]

    found = drawn()
    assert found.count(0) / 3000 == pytest.approx(0.75, abs=0.03)  # four standard deviations
    assert found.count(2) == 0
    assert drawn() == found
    assert drawn(seed=1) != found


def test_where_a_mixture_stops():
    parts = {"few": ArithmeticRows(4, seed=1), "many": ArithmeticRows(40, seed=2)}
    weights = {"few": 1, "many": 1}
    first = [part for part, _, _ in MixedRows(parts, weights).rows_of_parts()]
    assert first.count(0) == 4
    assert first.count(1) < 40
    all_of_them = list(MixedRows(parts, weights, stopping_strategy="all_exhausted").rows_of_parts())
    numbers = [number for _, number, _ in all_of_them]
    assert {f"many:{i}" for i in range(1, 41)} <= set(numbers)
    assert numbers.count("few:1") > 1


def test_parts_of_a_mixture_have_their_own_form_and_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Hi", "answer": "Hello"}\n')
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    renamed = LocalRows(tmp_path / "a.jsonl", rename_columns={"question": "prompt", "answer": "completion"})
    with pytest.raises(InputError) as error:
        read_messages(MixedRows({"a": renamed, "b": str(tmp_path / "b.jsonl")}), Reading())
    assert str(error.value).splitlines() == [
        "a + b: 1 of 2 rows are bad",
        "  row b:1: messages: no assistant message to learn from",
    ]
    assert read_messages(renamed, Reading()).messages == [[USER, ANSWER]]
    missing = LocalRows(tmp_path / "a.jsonl", rename_columns={"q": "prompt"})
    with pytest.raises(InputError, match="row 1: q: missing, which rename_columns names"):
        read_messages(missing, Reading())


def test_parts_that_cannot_be_told_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "Hi"}\n')
    with pytest.raises(InputError, match=r"row a:1: cannot tell the row form from the columns \['x'\]"):
        read_messages(MixedRows({"a": str(tmp_path / "a.jsonl")}), Reading())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sources": {}}, "none given"),
        ({"weights": {"a": 1}}, "weights are of"),
        ({"weights": {"a": 1, "b": -1}}, "finite and not negative"),
        ({"weights": {"a": 0, "b": 0}}, "none is above 0"),
        ({"stopping_strategy": "x"}, "stopping_strategy must be"),
        ({"sources": {"a/b": "x.jsonl"}}, "no spaces and slashes"),
        ({"sources": {f"s{i}": "x.jsonl" for i in range(65)}}, "64 at most"),
    ],
)
def test_bad_mixtures(options, expected):
    with pytest.raises(ValueError, match=expected):
        MixedRows(**{"sources": {"a": ArithmeticRows(1), "b": ArithmeticRows(1)}, **options})


def test_sources_of_all_splits_are_at_most_64():
    mixtures = [MixedRows({f"{split}{i}": ArithmeticRows(1) for i in range(40)}) for split in "ab"]
    data = InstructionDataModule(*mixtures, text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match=r"data.validation: with the other splits' its sources have 80 names"):
        data.setup("fit")


# -- rows that are skipped -------------------------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_counted(tmp_path):
    """What cannot be read, and what the template refuses, at once."""
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "1+1=", "completion": "2"}
    rows = [good, {"prompt": "a"}, {"prompt": "1$", "completion": "2"}, good, {"prompt": True, "completion": "2"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\nnonsense")
    options = {"tokenizer": "asset://arithmetic-base"}
    for _ in range(2):  # the second from the cache
        data = InstructionDataModule(str(path), **data_options(on_bad_rows="skip", **options))
        with pytest.warns(UserWarning, match="4 of 6 rows are bad") as caught:
            data.setup("fit")
        report = next(str(warning.message) for warning in caught if "rows are bad" in str(warning.message))
        for number in (2, 3, 5, 6):
            assert f"row {number}: " in report
        counts = data.splits.counts["train"]
        assert (counts.rows, counts.bad, counts.dropped) == (6, 4, 0)
        assert len(data.splits.tokenized("train")) == 2
    with pytest.raises(InputError, match="4 of 6 rows are bad"):  # which the cache knows
        InstructionDataModule(str(path), **data_options(**options)).setup("fit")
    path.write_text('{"prompt": "a"}\n' * 3)
    with pytest.raises(InputError, match="3 of 3 rows are bad"):
        InstructionDataModule(str(path), **data_options(on_bad_rows="skip", **options)).setup("fit")


def test_bad_rows_of_a_divided_source_are_counted_where_they_fall(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1) if i % 3 else None} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = InstructionDataModule(
        str(path), validation_fraction=0.25, text={"tokenizer": "asset://arithmetic-base"}, rows={"on_bad_rows": "skip"}
    )
    with pytest.warns(UserWarning, match="3 of 9 rows are bad"):
        data.setup("fit")
    assert (data.splits.counts["train"].rows, data.splits.counts["train"].bad) == (9, 3)
    assert (data.splits.counts["validation"].rows, data.splits.counts["validation"].bad) == (3, 1)


def test_memory_of_a_source_is_not_held(tmp_path):
    """Conversations lie on disk, in a file that no folder has, and it goes with them."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 2500)
    found = read_messages(LocalRows(path), Reading())
    file = found._records._file
    assert len(found) == 2500
    assert found.select([3, 4]).numbers == [4, 5]
    import os

    assert os.fstat(file.fileno()).st_size > 2500 * len(found[0].messages[0]["content"])
    assert os.fstat(file.fileno()).st_nlink == 0
    del found
    assert file.closed


def test_several_processes_tokenise_the_same(tmp_path):
    options = {"tokenizer": "asset://arithmetic-base"}
    tables = []
    for num_proc, columns in ((1, {}), (2, {"max_length": 10_000})):  # another option: not from the cache
        data = InstructionDataModule(
            ArithmeticRows(2300, seed=9), num_proc=num_proc, **data_options(**columns, **options)
        )
        data.setup("fit")
        tables.append(data.splits.tokenized("train").to_dict())
    assert tables[0] == tables[1]
    assert torch.equal(data.splits.lengths("train"), torch.tensor([len(ids) for ids in tables[0]["input_ids"]]))


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "rows", "message"),
    [
        ({"question": "a", "answer": "b"}, {"prompt_column": "questoin"},
         r"there is no 'questoin', which data\.rows\.prompt_column names; did you mean question\?"),
        ({"question": "a", "answer": "b"}, {"prompt_column": "question", "completion_column": "reply"},
         r"there is no 'reply', which data\.rows\.completion_column names"),
        ({"prompt": "a", "answer": "b"}, {}, r"there is 'prompt' and no 'completion' \(data\.rows\.completion_col"),
        ({"a": "b"}, {}, r"expected 'messages', or 'conversations'"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_is_named(row, rows, message):
    data = InstructionDataModule([row], rows=rows, text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match=message):
        data.setup("fit")


def test_a_file_of_plain_text_is_told_how_to_be_rows(tmp_path):
    (tmp_path / "story.txt").write_text("Once.")
    data = InstructionDataModule(str(tmp_path / "story.txt"), text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match=r'file, of plain text a \.jsonl of \{"text": \.\.\.\} a line'):
        data.setup("fit")


@pytest.mark.parametrize(("max_length", "warns"), [(6, True), (60, False), (None, False)])
def test_rows_that_are_mostly_cut_are_warned_of(max_length, warns):
    rows = [{"prompt": "1+1=", "completion": "1+1+0=2c0|2"}] * 4
    text = {"tokenizer": "asset://arithmetic-base", "max_length": max_length}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        InstructionDataModule(rows, text=text).setup("fit")
    found = [str(each.message) for each in caught if "max_length" in str(each.message)]
    assert found == ([f"train: most rows are longer than data.text.max_length: {max_length}"] if warns else [])
