"""Write docs/chat_templates.md: how the chat templates of common models are masked.

    python docs/make_chat_templates.py ../shared

The tokenizers of the shared folder have their own templates. TRL's templates (of the installed release, without which
nothing is written) are put on SmolLM2's tokenizer, with every special token that they name.
"""

# ruff: noqa: RUF001, RUF003 (DeepSeek's tokens have such bars)

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text.template import ChatTemplate, Rendered
from dft_lightning.data.text.tokenizer import end_of_turn, load_tokenizer
from dft_lightning.errors import InputError

TURN = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
TURNS = [*TURN, {"role": "user", "content": "Bye."}, {"role": "assistant", "content": "See you."}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}
TOOL_TURNS = [
    {"role": "user", "content": "Does it rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "wet"},
    {"role": "assistant", "content": "Yes."},
]
_PLACE = {"type": "object", "properties": {"place": {"type": "string", "description": "A town."}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": _PLACE}}]

OWN = {
    "smollm2": "tokenizers/smollm2",
    "qwen3": "tokenizers/qwen3",
    "gpt2": "tokenizers/gpt2",
    "stories260K": "models/stories260K",
}

_SPECIAL = re.compile(
    r"<[|｜][^<>\s{}'\"]*[|｜]>"  # <|im_end|>, <｜Assistant｜>
    r"|<\|[a-z_]+>|<[a-z_]+\|>"  # <|turn>, <turn|>
    r"|<(?:start|end)_of_[a-z]+>|</s>|<image>|\[/?INST\]"
)

_HEAD = """\
# Chat templates and what is learnt

Each row is a chat template and the passages of a conversation that are learnt from it, as text (`\\n` is a line
break). Path `generation` takes what the template marks by `{% generation %}`. Path `prefixes` renders the
conversation up to each assistant turn with the generation prompt, and up to its end: what the second has beyond the
first is learnt, if both are what the whole conversation begins with. On either path a turn is learnt up to and
including the tokens that end it; what follows them is not, nor is the next turn's header. What stands at a turn's
beginning in the table is what the model itself has to write after the prompt.

**Text and prompt begin alike.** What generation of a row's last turn starts from must be what the row's text begins
with, on either path. Nothing of it is learnt: some templates' `{% generation %}` blocks (of DeepSeek, GPT-OSS, Muse
and Qwen2.5 here) begin with the turn's own header, which is left out, in earlier turns as in the last.

**Empty thoughts are not learnt** where a turn begins with them (`<think>\\n\\n</think>\\n\\n`, `[THINK][/THINK]`,
those of Cohere, Gemma, GPT-OSS, Apertus and Kimi), whether the template writes them, the row does, or the prompt
begins them. `data.text.train_empty_thoughts: true` learns them.

**A row each.** Where a template rewrites earlier turns once more follow, each assistant turn makes a row of its own:
the conversation up to it, rendered as the model meets it in use, of which that turn is learnt. The run says of how
many conversations. `data.text.train_turns: each` does so whatever the template, `last` learns the last turn alone,
after the others as the template shows them. A template that marks its turns by `{% generation %}` is taken at its
word, and makes one row: those named `_training` below come with TRL.

**Marks are followed.** transformers takes the place of a `{% generation %}` block to be the length of what was
written before it, which is another place where the block stands in a macro, a `{% set %}` block, `{% call %}` or a
filter. Such marks are found in the text itself; where a filter changes what they are around, the row is refused.

**Many turns** are not each rendered with all that is before them, which would take time that grows with their square.
The first, one in the middle and the last are; the others are rendered with the turn before them, and the whole text
must be what these renderings have, one after the other. Where anything differs each is held against the whole after
all.

**Where a template is refused** the error shows the first place where the texts differ. If turns do not begin with the
generation prompt, set the template's variables by `data.text.chat_template_kwargs`, such as `enable_thinking: false`,
or another `data.text.chat_template`. A template that ends turns with no token of its own is warned of: the model does
not learn to stop.

**What a template leaves out.** Templates that leave out tool calls are refused for rows that have them. Tools, thoughts
of learnt turns (`reasoning_content`, `reasoning`, `thinking`) and contents that it does not write are named in a
warning, with the number of rows. What is not in the text as it stands is looked for a second time, with a word in its
place that nothing else has, as templates may escape or divide it. Many take the thoughts out of turns before the last:
of turns that are not learnt that is not said. The way out is another `data.text.chat_template`; a thought may also
stand in the content, as `<think>…</think>`.

**Variables** of the template are `data.text.chat_template_kwargs`, and a row's own `chat_template_kwargs`, which goes
before them for that row, in training and generation. Those that the template does not read are named in a warning.
"""

_TABLE = """\
| Template | Path | Ends a turn | One turn | System message and two turns | Tool call, result and answer |
| --- | --- | --- | --- | --- | --- |
"""


def trl_templates() -> dict[str, str]:
    """The chat templates that TRL comes with, by name; none where it is not installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def own_tokenizer(shared: Path, name: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the shared folder."""
    folder = shared / OWN[name]
    if name != "gpt2":
        return load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as checkpoint:  # of GPT-2 there are the bare vocabulary files
        GPT2Tokenizer.from_pretrained(folder).save_pretrained(checkpoint)
        return load_tokenizer(checkpoint)


def general_tokenizer(shared: Path, templates: dict[str, str]) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with the special tokens that the templates name."""
    tokenizer = load_tokenizer(shared / OWN["smollm2"])
    named = sorted({token for text in templates.values() for token in _SPECIAL.findall(text)})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|endoftext|>"})
    tokenizer.add_tokens(named, special_tokens=True)
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """The same tokenizer with another template."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def row(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The table's row of a tokenizer's template."""
    end, template = end_of_turn(tokenizer), ChatTemplate(tokenizer)
    cells = [
        f"`{name}`",
        template.path,
        _code(end[0]) if end else "no token",
        _learnt(template, TURN),
        _with_system(template),
        _learnt(template, TOOL_TURNS, TOOLS),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _with_system(template: ChatTemplate) -> str:
    cell = _learnt(template, [*SYSTEM, *TURNS])
    if cell.startswith("refused: System role"):
        return f"no system message; without: {_learnt(template, TURNS)}"
    return cell


def _learnt(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any = None) -> str:
    conversation = Conversation(messages, tools)
    found = _rows(template, conversation)
    if isinstance(found, list):
        passages = [" ".join(_code(row.text[span.start : span.end]) for span in row.spans) for row in found]
        return ("a row each: " if len(found) > 1 else "") + " and ".join(passages)
    cell = f"refused: {_reason(found)}"
    without = TextOptions(chat_template_kwargs={"enable_thinking": False})
    if isinstance(_rows(ChatTemplate(template.tokenizer, without), conversation), list):
        remedied = _learnt(ChatTemplate(template.tokenizer, without), messages, tools)
        return f"{cell}; `enable_thinking: false`: {remedied}"
    return cell


def _rows(template: ChatTemplate, conversation: Conversation) -> list[Rendered] | InputError:
    try:
        return template.rows(conversation)
    except InputError as error:
        return error


def _reason(error: InputError) -> str:
    text = re.sub(r"^the chat template (cannot be masked exactly: |refuses a [^:]*: |fails: )?", "", str(error))
    return re.split(r"\. At character|; set ", text)[0].replace("|", "\\|")


def _code(text: str) -> str:
    text = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{text}`" if text.strip() == text else f"` {text} `"  # Markdown takes one space off either side


def document(shared: Path) -> Iterator[str]:
    """The text of docs/chat_templates.md, by pieces."""
    yield _HEAD
    yield "\n## Tokenizers with their own templates\n\n"
    yield "GPT-2 and stories260K have none, and take `PLAIN_CHAT_TEMPLATE`.\n\n"
    yield _TABLE
    for name in OWN:
        yield row(name, own_tokenizer(shared, name))
    templates = trl_templates()
    tokenizer = general_tokenizer(shared, templates)
    yield f"\n## Templates that come with TRL {importlib.metadata.version('trl')}\n\n"
    yield "Made by `python docs/make_chat_templates.py ../shared`, which lends them a tokenizer with their tokens.\n\n"
    yield _TABLE
    for name, template in templates.items():
        yield row(name, with_template(tokenizer, template))


def main() -> None:
    """Write the page beside this file."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/make_chat_templates.py SHARED_FOLDER")
    if not trl_templates():
        raise SystemExit("trl, whose templates are half of the page, is not installed: pip install -e '.[bench]'")
    Path(__file__).with_name("chat_templates.md").write_text("".join(document(Path(sys.argv[1]))), encoding="utf-8")


if __name__ == "__main__":
    main()
