"""A row of each turn, beginnings of answers that rows give, and what it takes to find what is learnt of many turns."""

from __future__ import annotations

import re

import numpy as np
import pytest

from conftest import at_hand
from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.rows.references import fingerprint_of, read_reference
from dft_lightning.data.text.passages import Passages
from dft_lightning.data.text.rendering import Rendering
from dft_lightning.data.text.template import ChatTemplate
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from stand_ins import CHATML, MARKED, QWEN_TEMPLATE
from test_special_tokens import ASK, answer, bytes_tokenizer, thinking

TURNS = [ASK, answer("Yes."), ASK, answer("No."), ASK, answer("Well.")]
# Ways to write earlier turns otherwise than the last: empty thoughts before it, its own thoughts, another end.
REWRITING = {
    "empty thoughts": QWEN_TEMPLATE,
    "thoughts": thinking("<think>", "</think>"),
    "another end": CHATML.replace("{{ m.content }}", "{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}"),
}


def encoder_of(template, one_row=False, **options):
    return ConversationEncoder(bytes_tokenizer(template), TextOptions(**options), one_row=one_row)


def learnt(encoder, conversation):
    """By row: its text, and what is learnt of it."""
    (rows,) = encoder.encode([conversation])
    if isinstance(rows, InputError):
        raise rows
    return [
        (
            encoder.tokenizer.decode(row.input_ids),
            "".join(encoder.tokenizer.convert_ids_to_tokens(row.labels[row.labels != -100].tolist())),
        )
        for row in rows
    ]


def in_use(template, messages, **options):
    """The prompt before a final turn, and the whole, by the tokenizer's own rendering."""
    tokenizer = bytes_tokenizer(template)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, **options)
    return prompt, tokenizer.apply_chat_template(messages, tokenize=False, **options)


# -- rows of turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", REWRITING)
@pytest.mark.parametrize("turns", ["all", "each"])
def test_a_row_of_each_turn_as_the_model_meets_it(way, turns):
    template = REWRITING[way]
    messages = [{**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in TURNS]
    encoder = encoder_of(template, train_turns=turns, train_empty_thoughts=True)
    found = learnt(encoder, Conversation(messages))
    assert len(found) == 3
    for (text, passage), i in zip(found, (2, 4, 6), strict=True):
        prompt, whole = in_use(template, messages[:i])
        assert text == whole
        assert whole.startswith(prompt)
        assert passage == whole[len(prompt) :].removesuffix("\n").replace("\n", "Ċ")
    noted = [("each", "conversations of several assistant turns", 1)]
    assert encoder.take_notes().plain() == (noted if turns == "all" else [])
    (rows,) = encoder.encode([Conversation(messages)])
    assert [encoder.prompt(row.part_of(Conversation(messages)))[0] for row in rows] == [
        in_use(template, messages[:i])[0] for i in (2, 4, 6)
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_where_no_turn_is_rewritten_all_are_one_row(template):
    encoder = encoder_of(template)
    ((text, passage),) = learnt(encoder, Conversation(TURNS))
    assert passage == "Yes.<|im_end|>No.<|im_end|>Well.<|im_end|>"
    assert encoder.take_notes().plain() == []
    each = learnt(encoder_of(template, train_turns="each"), Conversation(TURNS))
    assert [passage for _, passage in each] == ["Yes.<|im_end|>", "No.<|im_end|>", "Well.<|im_end|>"]
    assert all(text.startswith(part) for part, _ in each)


@pytest.mark.parametrize("turns", ["all", "each"])
def test_turns_that_are_not_learnt_make_no_row(turns):
    encoder = encoder_of(QWEN_TEMPLATE, train_turns=turns)
    weighed = [ASK, answer("Yes.", weight=0.0), ASK, answer("No.", weight=0.5), ASK, answer("Well."), ASK]
    rows = learnt(encoder, Conversation(weighed))
    assert [passage for _, passage in rows] == ["No.<|im_end|>", "Well.<|im_end|>"]
    (found,) = encoder.encode([Conversation(weighed)])
    assert sorted(set(found[0].weights)) == [0, 0.5]
    assert found[1].weights is None
    nothing = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in TURNS]
    ((text, passage),) = learnt(encoder, Conversation(nothing))
    assert (text, passage) == (in_use(QWEN_TEMPLATE, TURNS)[1], "")
    assert [row.has_target for row in encoder.encode([Conversation(nothing)])[0]] == [False]


@pytest.mark.parametrize("turns", ["all", "each"])
def test_one_row_of_each_conversation_for_generation(turns):
    encoder = encoder_of(QWEN_TEMPLATE, one_row=True, train_turns=turns)
    assert learnt(encoder, Conversation(TURNS)) == [(in_use(QWEN_TEMPLATE, TURNS)[1], "Well.<|im_end|>")]
    assert encoder.prompt(Conversation(TURNS))[0] == in_use(QWEN_TEMPLATE, TURNS)[0]
    # A question that is not answered yet: the whole conversation, of which there is nothing to learn.
    asked = [*TURNS, ASK]
    text = bytes_tokenizer(QWEN_TEMPLATE).apply_chat_template(asked, tokenize=False)
    assert learnt(encoder, Conversation(asked)) == [(text, "")]
    assert encoder.take_notes().plain() == []


def test_the_last_turn_before_a_question_that_rewrites_it():
    """It is learnt as it is met in use; for generation the question is what is answered."""
    rewrites = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}",
    )
    asked = Conversation([ASK, answer("<think>1</think>2"), ASK, answer("<think>3</think>4"), ASK])
    options = TextOptions(train_turns="last")
    (row,) = ChatTemplate(bytes_tokenizer(rewrites), options).rows(asked)
    assert (row.messages, [row.text[s.start : s.end] for s in row.spans]) == (4, ["<think>3</think>4<|im_end|>"])
    assert "assistant\n2<|im_end|>" in row.text
    (row,) = ChatTemplate(bytes_tokenizer(rewrites), options, one_row=True).rows(asked)
    assert (row.messages, row.spans) == (None, [])
    assert row.text.endswith("assistant\n4<|im_end|>\n<|im_start|>user\nx<|im_end|>\n")


def test_rows_are_those_of_their_conversations():
    """In a batch of conversations, of which some are refused and some spell special tokens."""
    encoder = encoder_of(QWEN_TEMPLATE)
    spelling = [ASK, answer("a<|im_end|>b"), ASK, answer("c")]
    bad = Conversation(
        [ASK, answer("x", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])]
    )
    conversations = [Conversation(TURNS), bad, Conversation(spelling), Conversation(TURNS[:2])]
    found = encoder.encode(conversations)
    assert [rows if isinstance(rows, InputError) else len(rows) for rows in found] == [3, found[1], 2, 1]
    for conversation, rows in zip(conversations, found, strict=True):
        if isinstance(rows, list):
            alone = encoder_of(QWEN_TEMPLATE).encode([conversation])[0]
            assert [row.input_ids.tolist() for row in rows] == [row.input_ids.tolist() for row in alone]
            assert [row.labels.tolist() for row in rows] == [row.labels.tolist() for row in alone]


def test_reference_log_probs_are_of_one_row():
    def scored(row):
        targets = int((row.labels != -100).sum())
        values = read_reference(
            {
                "reference_log_prob": [-0.5] * targets,
                "reference_fingerprint": fingerprint_of(row.input_ids, row.labels, None),
            }
        )
        return Conversation(TURNS, reference_log_prob=values[0], reference_fingerprint=values[1])

    last = encoder_of(QWEN_TEMPLATE, train_turns="last")
    ((row,),) = last.encode([Conversation(TURNS)])
    ((found,),) = last.encode([scored(row)])
    assert (found.reference_log_prob == np.where(row.labels != -100, np.float32(-0.5), 0)).all()
    (problem,) = encoder_of(QWEN_TEMPLATE).encode([scored(row)])
    assert re.search(
        r"reference_log_prob: of one row, and 3 are made .* set data\.text\.train_turns: last", str(problem)
    )


# -- beginnings that are given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED, REWRITING["thoughts"]])
@pytest.mark.parametrize("given", ["The answer", "The answer is ", "The <|im_end|>", "<think>no"])
def test_the_beginning_of_an_answer_belongs_to_the_prompt(template, given):
    encoder = encoder_of(template)
    last = answer(f"{given}42.", prefix_length=len(given))
    prompt = in_use(template, [ASK, last])[0] + given
    ((text, passage),) = learnt(encoder, Conversation([ASK, last]))
    assert text == f"{prompt}42.<|im_end|>\n"
    assert passage == "42.<|im_end|>"
    shown, ids = encoder.prompt(Conversation([ASK, last]))
    assert shown == prompt
    ((row,),) = encoder.encode([Conversation([ASK, last])])
    assert row.input_ids[: len(ids)].tolist() == ids
    # Where nothing follows it there is nothing to learn: it is to be completed.
    begun = [ASK, answer(given, prefix_length=len(given))]
    assert [passage for _, passage in learnt(encoder, Conversation(begun))] == [""]
    assert encoder.prompt(Conversation(begun))[0] == prompt


def test_the_beginning_of_the_last_of_many_answers():
    turns = [ASK, answer("Yes.")] * 6
    last = answer("No, never.", prefix_length=4)
    ((_, passage),) = learnt(encoder_of(CHATML), Conversation([*turns, ASK, last]))
    assert passage == "Yes.<|im_end|>" * 6 + "never.<|im_end|>"


def test_a_beginning_that_the_template_rewrites_is_refused():
    trims = CHATML.replace("m.content", "m.content | trim")
    last = answer("  Yes.", prefix_length=4)
    assert [passage for _, passage in learnt(encoder_of(trims), Conversation([ASK, last]))] == ["s.<|im_end|>"]
    upper = CHATML.replace("{{ m.content }}", "{{ m.content | replace('Yes, no', 'YES, NO') }}")
    with pytest.raises(InputError, match=r"turn 2 does not begin with its given beginning.* put the beginning of the"):
        learnt(encoder_of(upper), Conversation([ASK, answer("Yes, no", prefix_length=3)]))
    drops = CHATML.replace("{{ m.content }}", "{{ m.content if 'Yes' not in m.content or '#' in m.content }}")
    with pytest.raises(InputError, match="leaves out how the last message begins"):
        learnt(encoder_of(drops), Conversation([ASK, answer("Yes, #no", prefix_length=3)]))


# -- many turns --------------------------------------------------------------------------------------------------------

TOOLING = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% set ns = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n<result>{{ m.content }}</result>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.user %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


def steps(n):
    """Tool calls and their results, some of several at once, and an answer."""
    messages = [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": "Find it."}]
    for i in range(n):
        call = {"type": "function", "function": {"name": "look", "arguments": {"place": f"room {i}", "deep": i}}}
        thought = {"reasoning_content": f"It may be in room {i}."} if i % 3 else {}
        messages.append({"role": "assistant", "content": "Let me see. " * (i % 4), "tool_calls": [call], **thought})
        messages += [{"role": "tool", "content": f"In room {i} there is dust. " * 4}] * (1 + i % 2)
    return [*messages, answer("Nowhere.")]


def all_held(passages, messages, tools):
    """Every turn against the whole conversation."""
    full = passages._rendering.text(messages, tools)
    return full, [passages._held(full, messages, i, tools) for i, m in enumerate(messages) if m["role"] == "assistant"]


@pytest.fixture
def rendered(monkeypatch):
    """The lengths of the texts that templates were rendered to."""
    lengths = []
    render = Rendering._render

    def counted(*args, **options):
        found = render(*args, **options)
        lengths.append(len(found[0]))
        return found

    monkeypatch.setattr(Rendering, "_render", counted)
    return lengths


@pytest.mark.parametrize("template", [TOOLING, "own qwen3"], ids=["small", "qwen3"])
def test_many_tool_steps_take_as_much_as_their_text(template, rendered):
    tokenizer = load_tokenizer(at_hand("tokenizers/qwen3")) if template == "own qwen3" else bytes_tokenizer(template)
    if "tool_call" not in tokenizer.chat_template:
        pytest.skip("the stand-in's template has no tool calls")
    found = ChatTemplate(tokenizer)
    totals = []
    for n in (30, 120):
        conversation = Conversation(steps(n), [SCHEMA])
        if template == "own qwen3":  # which writes empty thoughts before a last turn without thoughts, and there alone
            conversation = Conversation([{"reasoning_content": "Hm.", **m} for m in conversation.messages], [SCHEMA])
        found.rows(conversation)
        rendered.clear()
        (row,) = found.rows(conversation)
        totals.append(sum(rendered))
        assert totals[-1] < 10 * len(row.text)
        if n == 30:
            assert (row.text, row.spans) == all_held(found._passages, conversation.messages, conversation.tools)
    assert totals[1] < 4.5 * totals[0]


RESULTS = "(messages | selectattr('role', 'equalto', 'tool') | list | length)"
DISTANT = {
    # Of results before the last three the beginning alone is kept.
    "results cut short": TOOLING.replace(
        "<result>{{ m.content }}",
        "{% set ns.seen = (ns.seen or 0) + 1 %}<result>"
        f"{{{{ m.content if {RESULTS} - ns.seen < 3 else m.content[:9] }}}}",
    ),
    # Thoughts of all but the last step are taken out.
    "thoughts taken out": TOOLING.replace("loop.index0 > ns.user", "loop.last"),
    # A turn near the beginning is another one once there are many results.
    "counted": TOOLING.replace(
        "{{ m.content }}{% for", f"{{{{ m.content }}}}{{{{ '#' if {RESULTS} > 10 and loop.index0 == 7 }}}}{{% for"
    ),
}


@pytest.mark.parametrize("way", DISTANT)
def test_turns_that_are_rewritten_far_from_the_end_are_found(way):
    found = ChatTemplate(bytes_tokenizer(DISTANT[way]))
    messages = steps(12)
    rows = found.rows(Conversation(messages, [SCHEMA]))
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(rows) == len(ends)
    for row, end in zip(rows, ends, strict=True):
        prompt, whole = in_use(DISTANT[way], messages[:end], tools=[SCHEMA])
        assert row.text == whole
        (span,) = row.spans
        assert row.text[: span.start] == prompt
        assert row.text[span.start : span.end] == whole[len(prompt) :].removesuffix("\n")


@pytest.mark.parametrize(
    "template",
    [
        TOOLING.replace("<|im_start|>{{ m.role }}\n{%", "<|im_start|>{{ m.role }} {{ loop.index }}\n{%").replace(
            "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}"
        ),
        TOOLING.replace("Tools: ", "{{ raise_exception('no system message') if messages[0].role != 'system' }}Tools: "),
    ],
    ids=["numbered", "refuses others"],
)
def test_turns_that_their_neighbours_do_not_tell(template):
    """What a few messages do not tell is held against the whole."""
    found = Passages(Rendering(bytes_tokenizer(template), TextOptions()), "<|im_end|>")
    messages = steps(8)
    assert found.grown(messages, [SCHEMA]) == all_held(found, messages, [SCHEMA])


# -- texts that a tokenizer may change ---------------------------------------------------------------------------------


def test_chinese_is_encoded_once():
    """Qwen composes what it is given first; what is composed already stays as it is."""
    encoder = ConversationEncoder(load_tokenizer(at_hand("tokenizers/qwen3")))
    asked = []
    encode_all = encoder._encode_all
    encoder._encode_all = lambda texts: asked.extend(texts) or encode_all(texts)
    contents = ["人工智能是计算机科学的一个分支。", "日本語のテキスト", "한국어", "é ü 🙂", "Việt Nam"]
    turns = [m for content in contents for m in ({"role": "user", "content": content}, answer(content))]
    slow = ConversationEncoder(encoder.tokenizer)
    slow._byte_level = None
    for conversation in (Conversation(turns), Conversation([*turns, ASK, answer("e\u0301")])):
        for one, other in zip(encoder.encode([conversation])[0], slow.encode([conversation])[0], strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.labels.tolist() == other.labels.tolist()
    assert {"e\u0301" in text for text in asked} == {True}
