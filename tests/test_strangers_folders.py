"""A stranger's tokenizer, rows and comparison: read, and nothing of theirs is run, fetched or written elsewhere."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from commands import compare
from compare_records import LOSSES, whole_comparison
from conftest import TINY_LLAMA
from dft_lightning.assets import resolve
from dft_lightning.compare.grid import Run, write_config
from dft_lightning.compare.recorder import RunIdentity
from dft_lightning.compare.records import read_records
from dft_lightning.data import HubRows, LocalRows
from dft_lightning.data.text.template_source import copies_contents
from dft_lightning.data.text.tokenizer import end_of_turn, load_tokenizer
from dft_lightning.errors import InputError
from dft_lightning.models.loading import empty_causal_lm, load_causal_lm
from dft_lightning.modules.resume.saved import files_of
from dft_lightning.sampling.partial_file import PartialFile
from strangers import MODULE, stranger  # noqa: F401 (a fixture)

# -- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Changes a tokenizer's or model's config; returns the folder."""

    def write(name="tokenizer_config.json", **values):
        target = tmp_path / "base"
        shutil.copytree(resolve("asset://arithmetic-base"), target, dirs_exist_ok=True)
        (target / "chat_template.jinja").unlink(missing_ok=True)
        content = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps({**content, **values}))
        return target

    return write


def test_code_of_a_tokenizer(folder, stranger):  # noqa: F811
    """By a class that no version of transformers has, and beside one that it has."""
    path = folder(tokenizer_class="Strange", auto_map={"AutoTokenizer": ["strange.Tokenizer", None]})
    (path / "strange.py").write_text(stranger.code)
    with pytest.raises(
        InputError, match=r"wants code of its own to be run \(strange.Tokenizer\), which is not done una"
    ):
        load_tokenizer(path)
    load_tokenizer(folder(auto_map={"AutoTokenizer": [None, "strange.Tokenizer"]}))
    assert not stranger.ran()


@pytest.mark.parametrize("name", ["pipeline", "AutoModelForCausalLM", "utils", "__name__", 5, {"a": 1}])
def test_classes_of_tokenizers(folder, name):
    with pytest.raises(InputError, match="data.text.tokenizer: cannot load the tokenizer of"):
        load_tokenizer(folder(tokenizer_class=name))


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../../outside"])
def test_names_of_templates(folder, tmp_path, name):
    """They are names of files when the tokenizer is saved, into checkpoints too."""
    if name.startswith("/"):
        name = f"{tmp_path}{name}"
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": name, "template": "x"}]
    path = folder(chat_template=templates)
    with pytest.raises(InputError, match="has a chat template named .*outside"):
        files_of(load_tokenizer(path))
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.mkdir(MARKER) }}",
        "{% from 'os' import mkdir %}{{ mkdir(MARKER) }}",
        "{% extends '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.mkdir(MARKER) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['sys'].modules['os'].mkdir(MARKER) }}",
        "{{ ('%s' | attr('format')) }}{{ (messages | attr('__class__')).__base__.__subclasses__() }}",
        "{{ namespace.__init__.__globals__.__builtins__.open(MARKER, 'w') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ messages.append(1) }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)  # fmt: skip
def test_templates_have_no_way_out(stranger, template):  # noqa: F811
    text = template.replace("MARKER", repr(str(stranger.marker)))
    copies_contents(text)
    tokenizer = load_tokenizer("asset://arithmetic-base", chat_template=text)
    with pytest.raises(InputError):
        end_of_turn(tokenizer)
    assert not stranger.ran()


@pytest.mark.parametrize("iterated", ["range(3000)", "'x' * 3000"])
def test_templates_that_do_not_end(monkeypatch, iterated):
    """One that would, after a second: without the limit this test fails and does not hang."""
    monkeypatch.setattr("dft_lightning.data.text.time_limit.SECONDS", 0.05)
    loops = f"{{% for a in {iterated} %}}{{% for b in {iterated} %}}{{% endfor %}}{{% endfor %}}"
    rest = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(InputError, match="the chat template has not come to its end after 0.05 s of computing"):
        end_of_turn(load_tokenizer("asset://arithmetic-base", chat_template=loops + rest))


# -- models' folders -----------------------------------------------------------------------------------------------


def test_attention_code_of_a_models_config(folder, stranger):  # noqa: F811
    """A kernel on the hub is asked for by name: by options, and by no file."""
    path = folder("config.json", attn_implementation="a-stranger/kernel", _attn_implementation="a-stranger/kernel")
    load_causal_lm(path)
    empty_causal_lm(path)
    load_causal_lm({**TINY_LLAMA, "_attn_implementation": "a-stranger/kernel"})
    assert not stranger.ran()
    load_causal_lm(path, attn_implementation="a-stranger/kernel")
    assert stranger.ran()


def test_weights_that_are_pickles(folder, stranger):  # noqa: F811
    import torch

    path = folder()
    for file in path.glob("*.safetensors"):
        file.unlink()
    torch.save({"lm_head.weight": stranger.pickle()}, path / "pytorch_model.bin")
    with pytest.raises(InputError, match="model.model: cannot load"):
        load_causal_lm(path)
    assert not stranger.ran()


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_of_weights_that_is_none(folder, index):
    path = folder()
    for file in path.glob("*.safetensors"):
        file.unlink()
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model.model"):
        empty_causal_lm(path)


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def address():
    """Of a server of this test, and what was asked of it."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/picture.png", asked
    server.shutdown()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_pictures_in_rows_are_not_opened(tmp_path, address, nested, streamed):
    """They may be addresses, or any files of this machine."""
    from datasets import Dataset, Features, Image, List, Value

    url, asked = address
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"no picture")
    picture = [{"path": url, "bytes": None}, {"path": str(mine), "bytes": None}]
    rows = [[{"inner": each}] if nested else each for each in picture]
    plain = {"bytes": Value("binary"), "path": Value("string")}
    texts = {"prompt": Value("string"), "completion": Value("string")}
    stored = Features({**texts, "seen": List({"inner": plain}) if nested else plain})
    said = Features({**texts, "seen": List({"inner": Image()}) if nested else Image()}).to_dict()
    data = Dataset.from_dict({"prompt": ["1", "2"], "completion": ["3", "4"], "seen": rows}, features=stored)
    # datasets itself would open them to write them.
    if streamed:
        (tmp_path / "rows").mkdir()
        table = data.data.table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": said}})})
        pyarrow.parquet.write_table(table, tmp_path / "rows" / "train.parquet")
        source = HubRows(str(tmp_path / "rows"), streaming={})
    else:
        data.save_to_disk(tmp_path / "rows")
        info = tmp_path / "rows" / "dataset_info.json"
        info.write_text(json.dumps({**json.loads(info.read_text()), "features": said}))
        source = LocalRows(tmp_path / "rows")
    found = [row for _, row in source.rows()]
    assert [row["prompt"] for row in found] == ["1", "2"]
    seen = [row["seen"][0]["inner"] if nested else row["seen"] for row in found]
    assert [each["path"] for each in seen] == [url, str(mine)]
    assert not asked


def test_a_folder_with_a_script(tmp_path, stranger):  # noqa: F811
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.py").write_text(stranger.code)
    with pytest.raises(InputError, match="nor a dataset that can be loaded"):
        list(HubRows(str(rows)).rows())
    assert not stranger.ran()


# -- comparisons ---------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr("dft_lightning.compare.report.all_plots", lambda findings: [])


def rebuilt(folder, capsys):
    """The message of a report that is refused."""
    assert compare(["--report_only", str(folder)]) == 2
    return capsys.readouterr().err


def test_losses_of_a_report_are_not_imported(tmp_path, stranger, monkeypatch):  # noqa: F811
    from dft_lightning.compare.analysis import analyse
    from dft_lightning.compare.plots import style
    from dft_lightning.compare.plots.tokens import weight_of_p

    whole_comparison(tmp_path)
    settings = yaml.safe_load((tmp_path / "compare.yaml").read_text())
    settings["losses"]["CE"] = {**LOSSES["CE"], "class_path": f"{MODULE}.Loss"}
    findings = analyse(settings, read_records(tmp_path))
    with style.drawing():
        plot = weight_of_p(findings, style.Styles(["CE", "DFT"]))
    assert f"Not drawn: CE (its loss: {MODULE}.Loss is not imported because a file names it" in plot.caption
    assert not stranger.ran()


def test_pickles_of_probabilities(tmp_path, stranger):  # noqa: F811
    whole_comparison(tmp_path)
    record = next(record for record in read_records(tmp_path) if record.loss is not None)
    file = record.folder / "probabilities.npz"
    np.savez(file, before=np.array([stranger.pickle()], dtype=object), after=np.zeros(1))
    with pytest.raises(InputError, match="probabilities.npz: cannot be read"):
        _ = record.probabilities
    assert not stranger.ran()


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.mkdir [MARKER]", "!!python/name:os.system"])
def test_yaml_of_a_comparison(tmp_path, stranger, capsys, text, drawn):  # noqa: F811
    whole_comparison(tmp_path)
    (tmp_path / "compare.yaml").write_text(text.replace("MARKER", str(stranger.marker)))
    assert "compare.yaml: cannot be read" in rebuilt(tmp_path, capsys)
    assert not stranger.ran()


@pytest.mark.parametrize("place", ["plots", "plots/weight_of_p.svg"])
def test_a_report_is_not_written_through_links(tmp_path, capsys, drawn, place):
    output, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    whole_comparison(output)
    (output / place).parent.mkdir(exist_ok=True)
    (output / place).symlink_to(elsewhere)
    assert f"{place} is a link to {elsewhere}" in rebuilt(output, capsys)
    assert not elsewhere.exists()


def test_pages_replace_links(tmp_path, drawn):
    output, mine = tmp_path / "output", tmp_path / "mine"
    whole_comparison(output)
    mine.write_text("mine")
    for name in ("report.html", "report.md", "results.csv"):
        (output / name).symlink_to(mine)
    assert compare(["--report_only", str(output)]) == 0
    assert mine.read_text() == "mine"
    assert not (output / "report.html").is_symlink()


def test_a_runs_folder_and_its_log_are_not_written_through_links(tmp_path, monkeypatch):
    from dft_lightning.compare import execute

    (tmp_path / "elsewhere").mkdir()
    run = Run(RunIdentity("ce", "CE", 1e-3, 0), tmp_path / "ce", {})
    run.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="ce is a link to"):
        write_config(run)
    assert not any((tmp_path / "elsewhere").iterdir())
    run.folder.unlink()
    run.folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    (run.folder / "fit.log").symlink_to(tmp_path / "mine")

    class Places:
        get, put = staticmethod(dict), staticmethod(lambda place: None)

    class Children:
        run = staticmethod(lambda *args: 1)

    assert execute._run_stages(run, Places, Children).stage == "fit"
    assert (tmp_path / "mine").read_text() == "mine"


def test_configs_in_a_report_end_no_block(tmp_path, drawn):
    whole_comparison(tmp_path)
    settings = yaml.safe_load((tmp_path / "compare.yaml").read_text())
    settings["base"] = ["`````\n# Owned\n<script>alert(1)</script>"]
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings))
    assert compare(["--report_only", str(tmp_path)]) == 0
    block = (tmp_path / "report.md").read_text().split("## The comparison's config\n\n")[1]
    fence, *lines = block.strip().splitlines()
    assert fence == "``````yaml"
    assert [line for line in lines if line.startswith("``````")] == [lines[-1]]
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_answers_are_not_written_through_links(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out.jsonl.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="out.jsonl.partial is a link to"):
        PartialFile(tmp_path / "out.jsonl", {}, [], overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_lock_is_no_link(tmp_path):
    from dft_lightning.compare.command import _only_one

    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=".lock is a link to"), _only_one(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
