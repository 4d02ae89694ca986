"""What is learnt of a conversation, by every chat template that is at hand. What is expected is written out here."""

# ruff: noqa: RUF001 (DeepSeek's tokens have such bars)

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys

import pytest

from conftest import ROOT, SHARED, at_hand, shared
from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text import layout
from dft_lightning.data.text.template import ChatTemplate
from dft_lightning.data.text.tokenizer import as_parts, end_of_turn, load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from stand_ins import MARKED

sys.path.insert(0, str(ROOT / "docs"))

import make_chat_templates as docs

TEMPLATES = docs.trl_templates()
if TEMPLATES and importlib.metadata.version("trl") != "1.16.0":
    TEMPLATES = {}  # what is expected was written for that release
# Two of their ways in small, for where TRL is not installed: thoughts that the generation prompt begins and the answer
# does not have, and marked answers.
BEGUN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think></think>' if enable_thinking is false else '<think>\n' }}{% endif %}"
)
SMALL = {"nemotron_small": BEGUN, "small_training": MARKED}
TRIED = {**SMALL, **TEMPLATES}
NAMES = [*(f"own {name}" for name in docs.OWN), *TRIED]

ASKED, ANSWERED = ("Quebec tambourine?", "And the umbrella?"), ("Zanzibar lime.", "Only on Sundays.")
TURN = [{"role": "user", "content": ASKED[0]}, {"role": "assistant", "content": ANSWERED[0]}]
TURNS = [*TURN, {"role": "user", "content": ASKED[1]}, {"role": "assistant", "content": ANSWERED[1]}]
SYSTEM = {"role": "system", "content": "Wool and copper."}

# By the beginning of the name, the longest that fits.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "",
    "glm4moe_training": "<|user|>",  # within the marked block, as GLM stops at it
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "own gpt2": "<|endoftext|>",
    "own qwen3": "<|im_end|>",
    "own smollm2": "<|im_end|>",
    "own stories260K": "</s>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "small": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
THOUGHTLESS = "<think>\n\n</think>\n\n"
BEGINNINGS = {
    "": "",
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "idefics3": " ",
    "llava_next": " ",
    "muse_glimmer": " to=user<|message|>",
    "own qwen3": THOUGHTLESS,
    "qwen3": THOUGHTLESS,
    "qwen3_5_nothink": "",  # the generation prompt has the empty thoughts
    "qwen3_5_think": "\n</think>\n\n",  # the generation prompt begins them
    "qwen3_6": "\n</think>\n\n",
    "qwen3_8": "\n</think>\n\n",
    "qwen3_instruct": "",
    "qwen3_vl": "",
    "smolvlm": " ",
}
# Their generation prompt begins thoughts that the rendered answer does not have.
OTHER_PROMPT = ["deepseek_r1_distill", "deepseekv3"]
OTHER_PROMPT += [f"nemotron_3_{name}" for name in ("5_lightning", "nano", "super", "ultra")]
OTHER_PROMPT += ["nemotron_small", *(f"{name}_training" for name in OTHER_PROMPT)]
# They render the last answer otherwise than earlier ones.
REWRITES = ["own qwen3", "gptoss", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"]
NO_SYSTEM = ["gemma", "gemma_training"]


def longest(table, name):
    return table[max((key for key in table if name.startswith(key)), key=len)]


@functools.cache
def general():
    return docs.general_tokenizer(at_hand(), TRIED)


@functools.cache
def tokenizer_of(name):
    if not name.startswith("own "):
        return docs.with_template(general(), TRIED[name])
    return docs.own_tokenizer(at_hand(), name[4:])


@functools.cache
def encoder_of(name, **options):
    return ConversationEncoder(tokenizer_of(name), TextOptions(**options))


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def encode_all(name, messages, **options):
    (rows,) = encoder_of(name, **options).encode([Conversation(messages)])
    if isinstance(rows, InputError):
        raise rows
    return rows


def encode(name, messages, **options):
    (row,) = encode_all(name, messages, **options)
    return row


def check_learnt(name, row, answers, thoughts=False):
    """The learnt tokens are, run by run, those of the answers with what begins and ends each."""
    tokenizer = tokenizer_of(name)
    ids, learnt = row.input_ids.tolist(), (row.labels != -100).tolist()
    assert row.labels[learnt].tolist() == row.input_ids[learnt].tolist()
    borders = [i for i in range(len(ids) + 1) if (learnt[i - 1] if i else False) != (learnt[i] if i < len(ids) else 0)]
    runs = list(zip(borders[::2], borders[1::2], strict=True))
    ends = [longest(ENDS, name)] * len(answers)
    if name == "gptoss_training":
        ends[:-1] = ["<|end|>"] * (len(answers) - 1)
    begin = longest(BEGINNINGS, name)
    begin = "" if "think>" in begin and not thoughts else begin
    expected = [f"{begin}{answer}{end}" for answer, end in zip(answers, ends, strict=True)]
    found = [decode(tokenizer, ids[start:end]) for start, end in runs]
    if name == "own stories260K":  # SentencePiece's space before a word is the word's
        found = [text.lstrip() for text in found]
    assert found == expected
    # As characters of the text, too: nothing of the prompts, and nothing twice.
    rest = decode(tokenizer, [i for i, known in zip(ids, learnt, strict=True) if not known])
    for answer in answers:
        assert answer not in rest
    for asked in ASKED[: len(answers)]:
        assert asked in rest


# -- the mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_path_is_as_the_template_says(name):
    tokenizer = tokenizer_of(name)
    marked = re.search(r"{%-? *generation *-?%}", tokenizer.chat_template) is not None
    assert encoder_of(name).template.path == ("generation" if marked else "prefixes")
    end = end_of_turn(tokenizer)
    assert (end[0] if end else "") == longest(ENDS, name)
    assert end is None or end[0].endswith(tokenizer.convert_ids_to_tokens(end[1]))


@pytest.mark.parametrize("thoughts", [False, True], ids=["", "empty thoughts"])
@pytest.mark.parametrize("name", NAMES)
def test_one_turn(name, thoughts):
    if name in OTHER_PROMPT:
        with pytest.raises(InputError, match=r"turn 2 does not begin with the generation prompt.*chat_template_kwargs"):
            encode(name, TURN, train_empty_thoughts=thoughts)
        return
    check_learnt(name, encode(name, TURN, train_empty_thoughts=thoughts), ANSWERED[:1], thoughts)


@pytest.mark.parametrize("name", NAMES)
def test_every_assistant_turn(name):
    messages = TURNS if name in NO_SYSTEM else [SYSTEM, *TURNS]
    if name in NO_SYSTEM:
        with pytest.raises(InputError, match="System role not supported"):
            encode(name, [SYSTEM, *TURNS])
    if name in OTHER_PROMPT:
        problem = r"turn [35] does not begin with the generation prompt\. At character \d+ it has '.*; set data\."
        with pytest.raises(InputError, match=problem):
            encode(name, messages)
        return
    last = encode(name, messages, train_turns="last")
    check_learnt(name, last, ANSWERED[1:])
    earlier = [{**message, "weight": 0.0} if message["content"] == ANSWERED[0] else message for message in messages]
    assert encode(name, earlier).labels.tolist() == last.labels.tolist()
    each = encode_all(name, messages, train_turns="each")
    if name in REWRITES:
        found = encode_all(name, messages)
        assert [row.labels.tolist() for row in found] == [row.labels.tolist() for row in each]
    else:
        check_learnt(name, encode(name, messages), ANSWERED)
    # In use a model meets each turn after the ones before it, and none behind it.
    alone = encode(name, messages[:-2])
    assert [row.input_ids.tolist() for row in each] == [row.input_ids.tolist() for row in (alone, last)]
    assert [row.labels.tolist() for row in each] == [row.labels.tolist() for row in (alone, last)]


@pytest.mark.parametrize("name", [name for name in OTHER_PROMPT if "nemotron" in name and name in TRIED])
def test_prompt_without_thoughts_makes_the_turns_exact(name):
    (rendered,) = ChatTemplate(tokenizer_of(name), TextOptions(chat_template_kwargs={"enable_thinking": False})).rows(
        Conversation(TURNS)
    )
    learnt = [rendered.text[span.start : span.end] for span in rendered.spans]
    assert learnt == [f"{answer}<|im_end|>" for answer in ANSWERED]


VARIED = [
    ("Hi.", "Hello!"),
    (" spaced ", " spaced "),
    ("line\n", "\nline\n\n"),
    ("", "to nothing"),
    ("Think.", "<think>\nhm\n</think>\n\nYes."),
    ("Think.", "no thoughts </think> here <think>"),
    ("{{ x }} {% generation %}", "{{ messages }}\\n'\"<b>&amp;"),
    ("é 漢字 🙂", "ü 🙂\u2028"),
    ("<|im_end|>\n<|im_start|>", "a<|im_end|>b"),
]


@pytest.mark.parametrize("name", NAMES)
def test_one_rendering_is_as_good_as_all(name, monkeypatch):
    template = ChatTemplate(tokenizer_of(name), TextOptions(allow_special_tokens=True))
    monkeypatch.setattr(layout, "_SAMPLE", 0)  # of which all are rendered in every way
    for i, (asked, answered) in enumerate(VARIED):
        after, then = VARIED[i - 1]
        first = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        second = [{"role": "user", "content": after}, {"role": "assistant", "content": then}]
        weighed = [first[0], {**first[1], "weight": 0.0}, second[0], {**second[1], "weight": 0.5}]
        for messages in (weighed, [{**SYSTEM, "content": after}, *first, *second]):
            try:
                laid_out = template._layouts.fill(messages)
            except InputError:  # the template refuses the system message, or the contents
                continue
            if laid_out is not None:
                assert laid_out == template._masked(messages)
    # And it is what is taken, most of the time.
    if name not in OTHER_PROMPT:
        plain = [{**message, "content": message["content"].rstrip(".?")} for message in TURN]
        assert template._layouts.fill(plain) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("messages", [TURN, TURNS, docs.TOOL_TURNS], ids=["turn", "turns", "tools"])
def test_generation_blocks_are_as_transformers_finds_them(name, messages):
    tokenizer = tokenizer_of(name)
    if encoder_of(name).template.path == "prefixes":
        return
    tools = docs.TOOLS if messages is docs.TOOL_TURNS else None
    encoder = encoder_of(name, train_empty_thoughts=True)
    (rows,) = encoder.encode([Conversation(messages, tools)])
    if isinstance(rows, InputError):
        assert "leaves out tool calls" in str(rows) or name in OTHER_PROMPT
        return
    (row,) = rows
    given = as_parts(messages) if name.startswith(("idefics3", "llava", "smolvlm")) else messages
    found = tokenizer.apply_chat_template(
        given, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = found["input_ids"], found["assistant_masks"]
    assert row.input_ids.tolist() == ids
    prompt, _ = encoder.prompt(Conversation(messages, tools))
    text = tokenizer.apply_chat_template(given, tools=tools, tokenize=False)
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = [i for i in range(len(ids)) if mask[i] and not mask[i - 1]]
    header = ids[starts[-1] : sum(end <= len(prompt) for _, end in places)]  # which some mark with the turn
    # The end-of-turn tokens right after a block are learnt, and what a block has after them is not.
    end = tokenizer.convert_tokens_to_ids(re.findall(r"<.*?>", longest(ENDS, name)))
    expected = [0] * len(ids)
    for start in starts:
        stop = start
        while stop < len(ids) and mask[stop]:
            stop += 1
        places = [i for i in range(start, stop + 1) if ids[i : i + len(end)] == end]
        through = max(places) + len(end) if places else stop
        start += len(header) * (ids[start : start + len(header)] == header)
        expected[start:through] = [1] * (through - start)
    assert (row.labels != -100).astype(int).tolist() == expected


def test_the_documented_table_is_what_the_code_does():
    if not TEMPLATES:
        pytest.skip("the table is of TRL 1.16.0")
    for folder in docs.OWN.values():
        shared(folder)
    made = "".join(docs.document(SHARED))
    assert (ROOT / "docs" / "chat_templates.md").read_text(encoding="utf-8") == made, (
        "run python docs/make_chat_templates.py ../shared"
    )


# -- ways of templates, in small -----------------------------------------------------------------------------------


def small(template):
    return load_tokenizer("asset://arithmetic-base", chat_template=template)  # its special tokens are ^ and $


def learnt(template, messages, tools=None, **options):
    rows = ChatTemplate(small(template), TextOptions(**options)).rows(Conversation(messages, tools))
    return [row.text[span.start : span.end] for row in rows for span in row.spans]


SUMS = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2="},
    {"role": "assistant", "content": "4"},
]
TURNS_OF = "{% for m in messages %}{{ m.content }}{{ '$' if m.role == 'assistant' }}{% endfor %}"


def test_what_ends_the_text_need_not_stand_between_turns():
    template = TURNS_OF + "{% if not add_generation_prompt %}+^{% endif %}"
    assert learnt(template, SUMS) == ["2$", "4$"]
    assert end_of_turn(small(template)) == ("$", 2)
    # Not even where it directly follows the end of the turn.
    template = TURNS_OF + "{% if not add_generation_prompt %}^{% endif %}"
    assert learnt(template, SUMS) == ["2$", "4$"]


def test_a_turn_may_end_in_two_tokens():
    template = TURNS_OF.replace("'$'", "'^$'")
    assert learnt(template, SUMS) == ["2^$", "4^$"]
    assert end_of_turn(small(template)) == ("^$", 2)
    for block in (
        "{% generation %}{{ m.content }}{% endgeneration %}^$",
        "{% generation %}{{ m.content }}^{% endgeneration %}$",
    ):
        marked = (
            "{% for m in messages %}{% if m.role == 'assistant' %}BLOCK{% else %}{{ m.content }}{% endif %}{% endfor %}"
        )
        assert learnt(marked.replace("BLOCK", block), SUMS) == ["2^$", "4^$"]


def test_a_turn_may_be_marked_by_pieces():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}{% endgeneration %}{% generation %}$+{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert learnt(template, SUMS) == ["2$", "4$"]
    assert learnt(template, SUMS, train_turns="last") == ["4$"]


def test_contents_as_lists_of_parts():
    template = TURNS_OF.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert learnt(template, SUMS) == ["2$", "4$"]
    encoder = ConversationEncoder(small(template))
    assert encoder.prompt(Conversation(SUMS))[0] == "1+1=2$2+2="


def test_tool_calls_that_a_template_leaves_out_are_refused():
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages = [SUMS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(InputError, match=r"leaves out tool calls; set data\.text\.chat_template"):
        learnt(TURNS_OF, messages)
    called = "{{ m.tool_calls[0].function.name if m.tool_calls }}"
    assert learnt(TURNS_OF.replace("{{ m.content }}", "{{ m.content }}" + called), messages) == ["add$"]


def test_the_remedy_is_of_the_problem():
    with pytest.raises(
        InputError, match=r"turn 2 does not begin with .*At character 4 it has '-' there and '2\$'.*kwargs"
    ):
        learnt(TURNS_OF + "{{ '-' if add_generation_prompt }}", SUMS[:2])
    rewriting = TURNS_OF.replace("m.content }}", "m.content }}{{ '+' if loop.last and m.role == 'assistant' }}")
    # Where turns are rewritten each has a row; where that has been asked to be one row there is nothing to be done.
    assert learnt(rewriting, SUMS) == ["2+$", "4+$"]
    passages = ChatTemplate(small(rewriting))._passages
    with pytest.raises(
        InputError, match=r"turn 2 is rendered otherwise .* it has '\+\$' there and .*train_turns: each or last"
    ):
        passages.grown(SUMS)
