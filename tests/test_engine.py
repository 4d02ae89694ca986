"""Answers from a server: what it can do is found out, answers are read, faults end in one message, processes end."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from dft_lightning.assets import resolve
from dft_lightning.component import group_of
from dft_lightning.engine import Answer, EngineClient, EngineOptions, Question, Server
from dft_lightning.engine.client import seed_of
from dft_lightning.engine.requests import Form, Requests
from dft_lightning.errors import InputError
from dft_lightning.models.generation import GenerationOptions
from engine_stub import END, TOKENS, greedy_tokens, log_prob_of, sampled_tokens, seeds, serving

pytest.importorskip("openai", reason="the extra engine is not installed")
pytestmark = pytest.mark.timeout(60)

GREEDY = GenerationOptions(30)
SAMPLED = GenerationOptions(30, do_sample=True)
PROMPT = [1, 5, 14, 5, 15]
PROMPTS = [[1, 4 + a, 14, 4 + b, 15] for a in range(5) for b in range(4)]
STUB = Path(__file__).with_name("engine_stub.py")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve("asset://arithmetic-base"))


@pytest.fixture
def client_of(tokenizer):
    """Makes clients of a stub, which are closed at the end."""
    made = []

    def client(stub, generation=GREEDY, stops=(END,), **options):
        options = {"retries": 1, "timeout": 5.0, "concurrency": 4, **options}
        made.append(EngineClient(EngineOptions("openai", stub.url, **options), tokenizer, generation, stops))
        return made[-1]

    yield client
    for each in made:
        each.close()


def questions(n=1):
    return [Question(number, prompt, n, seed=7) for number, prompt in enumerate(PROMPTS)]


def written(tokens, end=(END,), longest=30, log_probs=True):
    """The answer that is these tokens up to an end."""
    place = next((i for i, token in enumerate(tokens[:longest]) if token in end), None)
    said = tokens[:longest] if place is None else tokens[: place + 1]
    text = "".join(TOKENS[token] for token in (said if place is None else said[:-1]))
    log_prob = pytest.approx(sum(map(log_prob_of, said))) if log_probs else None
    return Answer(text, log_prob, len(said), place is not None)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vllm"}, "kind must be one of module, openai, got 'vllm'"),
        ({"url": "http://localhost:1/v1", "retries": 1}, "kind module has no url, retries: set kind: openai"),
        ({"kind": "openai"}, "url (of a running server) or command (that starts one), one of them"),
        (
            {"kind": "openai", "url": "http://a/v1", "command": "serve {folder} {port}"},
            "takes url (of a running server) or command (that starts one), not both",
        ),
        ({"kind": "openai", "url": "localhost:8000"}, "url must be an address such as http://localhost:8000/v1"),
        ({"kind": "openai", "url": "http:///v1"}, "url must be an address such as http://localhost:8000/v1"),
        ({"kind": "openai", "url": "http://me:secret@a/v1"}, "set OPENAI_API_KEY"),
        ({"kind": "openai", "command": "vllm serve x"}, "command must say {folder} and {port}, as in vllm serve"),
        ({"kind": "openai", "command": "serve {folder} {port} {host}"}, "command has {host}, and nothing but"),
        ({"kind": "openai", "command": "serve '{folder} {port}"}, "command cannot be split into words (No closing"),
        ({"kind": "openai", "url": "http://a/v1", "concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"kind": "openai", "url": "http://a/v1", "retries": -1}, "retries must be at least 0, got -1"),
        ({"kind": "openai", "url": "http://a/v1", "timeout": 0.0}, "timeout must be a number of seconds above 0"),
        ({"kind": "openai", "url": "http://a/v1", "start_timeout": float("inf")}, "start_timeout must be a number"),
        ({"kind": "openai", "url": "http://a/v1", "model": ""}, "model must be a name on the server"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        group_of(EngineOptions, options, "engine")


def test_a_command_may_hold_json():
    EngineOptions("openai", command="""vllm serve {folder} --port {port} --override '{"a": {"b": 1}}'""")


def test_the_package_is_named_where_it_is_missing(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'dft-lightning\[engine\]'"):
        EngineClient(EngineOptions("openai", "http://localhost:1/v1"), tokenizer, GREEDY, [END])


def test_the_room_is_imported_without_the_package():
    code = "import sys, dft_lightning.engine; print('openai' in sys.modules, 'torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=env)
    assert done.stdout.split() == ["False", "False"]


def test_without_an_end_nothing_is_asked(tokenizer):
    with pytest.raises(InputError, match="no token ends a turn"):
        EngineClient(EngineOptions("openai", "http://localhost:1/v1"), tokenizer, GREEDY, [])


# -- what a server can do ----------------------------------------------------------------------------------------------

SERVERS = [
    pytest.param({}, Form(True, "fields", True), (True, True, True), id="all"),
    pytest.param({"usage": False}, Form(True, "fields", True), (True, True, True), id="uncounted"),
    pytest.param(
        {"token_ids": False, "extras": "generation_config", "n": "ignored", "log_probs": "none"},
        Form(False, "generation_config", True),
        (False, False, True),
        id="as transformers",
    ),
    pytest.param(
        {"extras": "refused", "obeys": ("temperature", "top_p", "logit_bias")},
        Form(True, "none", True),
        (True, True, False),
        id="plain",
    ),
    pytest.param(
        {"extras": "ignored", "obeys": ("temperature", "top_p", "logit_bias"), "n": "same"},
        Form(True, "fields", True),
        (False, True, False),
        id="takes all and ends by itself",
    ),
    pytest.param({"log_probs": "content"}, Form(True, "fields", True), (True, True, True), id="as llama.cpp"),
    pytest.param({"log_probs": "refused"}, Form(True, "fields", False), (True, False, True), id="no log-probs"),
]


@pytest.mark.parametrize(("ways", "form", "can"), SERVERS)
def test_what_a_server_can_do_is_found_out(ways, form, can, client_of):
    with serving(**ways) as stub:
        found = client_of(stub, SAMPLED).check(PROMPT)
        assert found.form == form
        assert (found.several, found.log_probs, found.stop_token_ids) == can


@pytest.mark.parametrize(("ways", "form", "can"), SERVERS)
def test_answers_are_those_of_the_server(ways, form, can, client_of):
    """Greedy and sampled, by prompts as ids and as text, of several samples at once and of one after the other."""
    with serving(**ways) as stub:
        found = dict(client_of(stub).ask(questions()))
        assert found == {k: [written(greedy_tokens(p, stub.ways), log_probs=can[1])] for k, p in enumerate(PROMPTS)}
        client = client_of(stub, SAMPLED)
        client.check(PROMPT)
        stub.requests.clear()
        found = dict(client.ask(questions(n=3)))
        assert len(stub.requests) == len(PROMPTS) * (1 if can[0] else 3)
        for key, prompt in enumerate(PROMPTS):
            drawn = [seed_of(7, key, 0) + i if can[0] else seed_of(7, key, i) for i in range(3)]
            said = [written(sampled_tokens(prompt, seed, 1.0), log_probs=can[1]) for seed in drawn]
            assert found[key] == said


def test_what_can_be_done_is_asked_once(client_of):
    with serving() as stub:
        client = client_of(stub)
        assert client.check() is client.check(PROMPT)
        asked = len(stub.requests)
        list(client.ask(questions()[:2]))
        assert len(stub.requests) == asked + 2


def test_no_more_requests_at_once_than_asked_for_and_questions_are_read_as_they_are_asked(client_of):
    with serving() as stub:
        stub.pause = 0.02
        read = []
        client = client_of(stub, concurrency=3)
        client.check(PROMPT)
        answers = client.ask(question for question in questions() if read.append(question.key) is None)
        next(answers)
        assert len(read) <= 4
        assert len(list(answers)) == len(PROMPTS) - 1
        assert stub.most == 3


def test_longer_answers_are_cut_and_say_so(client_of):
    with serving() as stub:
        found = dict(client_of(stub, GenerationOptions(4)).ask(questions()))
        for key, prompt in enumerate(PROMPTS):
            assert found[key] == [written(greedy_tokens(prompt, stub.ways), longest=4)]
            assert not found[key][0].finished


@pytest.mark.parametrize("shows_end", [False, True])
def test_an_end_of_ones_own_is_left_out_of_the_text(shows_end, client_of):
    """Digits 7 and 8 end a turn here, no special tokens: some servers show them, others do not."""
    ends = (TOKENS.index("7"), TOKENS.index("8"), END)
    with serving(shows_end=shows_end) as stub:
        found = dict(client_of(stub, stops=ends).ask(questions()))
        assert found == {k: [written(greedy_tokens(p, stub.ways), ends)] for k, p in enumerate(PROMPTS)}
        assert found != {k: [written(greedy_tokens(p, stub.ways))] for k, p in enumerate(PROMPTS)}


def test_log_probs_without_the_end_are_none(client_of):
    with serving(log_probs="without end") as stub:
        found = dict(client_of(stub).ask(questions()))
        assert found == {k: [written(greedy_tokens(p, stub.ways), log_probs=False)] for k, p in enumerate(PROMPTS)}


def test_log_probs_of_a_temperature_are_not_the_models_own(client_of):
    warm = GenerationOptions(30, do_sample=True, temperature=0.7)
    with serving(log_probs="tempered") as stub:
        assert not client_of(stub, warm).check(PROMPT).log_probs
        assert {each[0].log_prob for _, each in client_of(stub, warm).ask(questions())} == {None}
        assert client_of(stub, SAMPLED).check(PROMPT).log_probs
    with serving() as stub:
        assert client_of(stub, warm).check(PROMPT).log_probs


def test_a_run_that_goes_on_asks_the_same(client_of):
    with serving() as stub:
        client = client_of(stub, SAMPLED)
        client.check(PROMPT)
        stub.requests.clear()
        whole = dict(client.ask(questions(n=2)))
        asked = seeds(stub)
        assert set(asked.values()) == {1}
        stub.requests.clear()
        assert dict(client.ask(questions(n=2)[5:])) == {key: whole[key] for key in range(5, len(PROMPTS))}
        assert seeds(stub).keys() <= asked.keys()
    drawn = {seed_of(seed, key, sample) for seed, key, sample in itertools.product(range(10), repeat=3)}
    assert len(drawn) == 1000
    assert max(drawn) < 2**31


@pytest.mark.parametrize(
    ("ways", "generation", "stops", "message"),
    [
        ({"obeys": ("stop_token_ids", "top_k", "top_p")}, SAMPLED, (END,), "greedy answer at temperature 5 "),
        (
            {"obeys": ("stop_token_ids", "temperature", "top_p")},
            GenerationOptions(30, True, top_k=5),
            (END,),
            "the server ignores top_k: leave it out",
        ),
        (
            {"obeys": ("stop_token_ids", "temperature", "top_k")},
            GenerationOptions(30, True, top_p=0.9),
            (END,),
            "the server ignores top_p: leave it out",
        ),
        ({"extras": "refused"}, GREEDY, (END, 16), "does not seem to end an answer at ',' (token 16) by itself"),
        ({"obeys": ("logit_bias",), "ends": ()}, GREEDY, (END,), "does not seem to end an answer at '$' (token 2)"),
        ({"token_ids": False, "counts": 1}, GREEDY, (END,), "counts 6 tokens in a prompt of 5: its tokenizer"),
        ({"models": ()}, GREEDY, (END,), "the server lists no model"),
        ({"models": ("a", "b")}, GREEDY, (END,), "lists several models: set engine.model to one of a, b"),
    ],
)
def test_what_a_server_would_ignore_is_refused(ways, generation, stops, message, client_of):
    with serving(**ways) as stub, pytest.raises(InputError) as error:
        client_of(stub, generation, stops).check(PROMPT)
    assert message in str(error.value)
    assert str(error.value).startswith(stub.url)


def test_options_that_are_obeyed_pass(client_of):
    with serving() as stub:
        strict = GenerationOptions(30, True, temperature=0.5, top_p=0.9, top_k=7)
        client_of(stub, strict).check(PROMPT)
        (body,) = [body for body in stub.requests if body.get("top_k") == 1][:1]
        assert body["temperature"] == 5.0
        stub.requests.clear()
        list(client_of(stub, strict).ask(questions()[:1]))
        body = stub.requests[-1]
        assert [body[name] for name in ("temperature", "top_p", "top_k", "max_tokens")] == [0.5, 0.9, 7, 30]
        assert [body[name] for name in ("min_p", "frequency_penalty", "presence_penalty")] == [0.0, 0.0, 0.0]
        assert [body[name] for name in ("repetition_penalty", "repeat_penalty")] == [1.0, 1.0]


# -- another model -----------------------------------------------------------------------------------------------------


def test_the_model_is_told_by_its_name(client_of):
    with serving(models=("digits", "letters")) as stub:
        client_of(stub, model="digits").check(PROMPT)
        with pytest.raises(InputError, match="has no model 'digit'; did you mean digits"):
            client_of(stub, model="digit").check(PROMPT)
        with pytest.raises(InputError, match="has no model 'other': it lists digits, letters"):
            client_of(stub, model="other").check(PROMPT)


def test_the_model_is_told_by_what_it_says(client_of):
    with serving() as stub:
        tokens = greedy_tokens(PROMPT, stub.ways)[:6]
        own = [log_prob_of(token) for token in tokens]
        client = client_of(stub)
        client.check_model(PROMPT, tokens, log_probs=own)
        client.check_model(PROMPT, [*greedy_tokens(PROMPT, stub.ways)[:20]])  # with its end
        other = [*tokens[:4], 4 + (tokens[4] - 3) % 10, tokens[5]]
        client.check_model(PROMPT, other, clear=4)
        with pytest.raises(
            InputError, match=r"digits is another model .* says '\d+' to a known prompt, where it should"
        ):
            client.check_model(PROMPT, other)
        with pytest.raises(InputError, match="gives a known text log-probs that are 0.3 off in the mean"):
            client.check_model(PROMPT, tokens, log_probs=[value - 0.3 for value in own])
        client.check_model(PROMPT, tokens, log_probs=[*own[:3], -50.0, -50.0, -50.0], clear=3)
        with pytest.raises(ValueError, match="clear must lie in 1 to 6, got 0"):
            client.check_model(PROMPT, tokens, clear=0)


# -- prompts as text ---------------------------------------------------------------------------------------------------


def test_a_prompt_without_a_text_is_named(client_of):
    """Token 19 of the model's vocabulary is none of the tokenizer's."""
    with serving(token_ids=False) as stub:
        client = client_of(stub)
        client.check(PROMPT)
        asked = [Question("row 1", PROMPT), Question("row 2", [1, 19, 5])]
        with pytest.raises(
            InputError, match=r"no text tokenises to this prompt's tokens.*'row 2'; 1 prompts were answered"
        ):
            list(client.ask(asked))


class AddsFirst:
    """A tokenizer that puts a first token in by itself, and shows it in texts."""

    pad_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [1, *(TOKENS.index(letter) for letter in text)]}

    def decode(self, ids, **options):
        return "".join(TOKENS[token] for token in ids)


def test_a_first_token_that_the_server_puts_in_is_left_out():
    requests = Requests("m", AddsFirst(), [END])
    assert requests.text([1, 5, 14]) == "1+"
    with pytest.raises(InputError, match="no text"):
        requests.text([5, 14])


# -- faults ------------------------------------------------------------------------------------------------------------

FAULTS = {
    "429": "Error code: 429 .*too many",
    "500": "Error code: 503 .*it is loading",
    "no_json": "an answer that is no JSON",
    "a_list": "an answer",
    "no_choices": "an answer without choices",
    "null_choices": "an answer without choices",
    "no_reason": r"an answer that ends without a reason \(None\)",
    "cut": "no connection, or one that breaks",
    "gone": "no connection, or one that breaks",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing(fault, client_of):
    with serving() as stub:
        client = client_of(stub)
        client.check(PROMPT)
        stub.faults = [fault]
        found = dict(client.ask(questions()))
        assert found == {k: [written(greedy_tokens(p, stub.ways))] for k, p in enumerate(PROMPTS)}
        assert not stub.faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_one_message_and_loses_nothing(fault, client_of):
    with serving() as stub:
        client = client_of(stub)
        client.check(PROMPT)
        stub.fault_after = (stub.granted + 6, fault)
        found, before = {}, stub.tried
        with pytest.raises(InputError, match=FAULTS[fault]) as error:
            found.update(client.ask(questions()))
        assert len(found) == 6
        assert found.items() <= {k: [written(greedy_tokens(p, stub.ways))] for k, p in enumerate(PROMPTS)}.items()
        assert str(error.value).startswith(stub.url)
        assert ", 2 times" in str(error.value)
        assert str(error.value).endswith("; 6 prompts were answered")
        assert stub.tried - before <= 6 + 2 * 4  # those under way, each twice


@pytest.mark.parametrize(
    ("fault", "message"),
    [("401", "set OPENAI_API_KEY"), ("400", "too long a prompt.*; the prompt was 3; "), ("nan", "NaN or infinite")],
)
def test_what_another_try_does_not_mend_is_tried_once(fault, message, client_of):
    with serving() as stub:
        client = client_of(stub, concurrency=1)
        client.check(PROMPT)
        stub.fault_after = (stub.granted + 3, fault)
        before = stub.tried
        with pytest.raises(InputError, match=message):
            list(client.ask(questions()))
        assert stub.tried == before + 4


def test_a_slow_server(client_of):
    with serving() as stub:
        client = client_of(stub, timeout=0.3, retries=0)
        client.check(PROMPT)
        stub.faults = ["slow"]
        message = r"no answer within 0.3 seconds, at the only try.*longer timeout.*; \d+ prompts were answered"
        with pytest.raises(InputError, match=message):
            list(client.ask(questions()))


def test_no_server(client_of):
    with serving() as stub:
        pass
    with pytest.raises(InputError, match=r"no connection.*does the server run\?") as error:
        client_of(stub).check(PROMPT)
    assert stub.url in str(error.value)


def test_an_address_of_something_else(client_of):
    with serving() as stub:
        stub.url = stub.url.removesuffix("/v1")
        with pytest.raises(InputError, match="ends in /v1"):
            client_of(stub).check(PROMPT)


def test_the_key_is_the_environments(client_of, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing is there, and none is for this machine
    with serving() as stub:
        client_of(stub).check(PROMPT)
        assert stub.keys == {"Bearer secret"}


def test_whoever_stops_asking_is_not_kept(client_of):
    """Requests under way wait for a slow server; nobody waits for them."""
    with serving() as stub:
        client = client_of(stub)
        client.check(PROMPT)
        stub.faults = [None, *["slow"] * 40]
        answers = client.ask(questions())
        next(answers)
        begun = threading.active_count()
        answers.close()
        assert stub.tried < len(PROMPTS)
        stub.released.set()
        until = time.monotonic() + 10
        while threading.active_count() >= begun and time.monotonic() < until:
            time.sleep(0.02)
        assert threading.active_count() < begun


def test_an_error_of_the_questions_is_theirs(client_of):
    def some():
        yield questions()[0]
        raise KeyError("mine")

    with serving() as stub, pytest.raises(KeyError, match="mine"):
        list(client_of(stub).ask(some()))


# -- a server of one's own ---------------------------------------------------------------------------------------------


def command(*how):
    return f"{sys.executable} -S {STUB} {{port}} {{folder}} {' '.join(how)}"


def written_by(folder):
    return json.loads((folder / "pids.json").read_text())


def is_there(number):
    """Whether a process runs: one that has ended and that nobody has asked after does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(*numbers):
    until = time.monotonic() + 15
    while any(map(is_there, numbers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(is_there, numbers))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", [(), ("stubborn",)])
def test_a_server_answers_inside_and_is_gone_after(how, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    folder = tmp_path / "a model {port}"
    folder.mkdir()
    with Server(command(*how), folder, tmp_path / "logs" / "server.log", 20, grace=0.5) as server:
        found = written_by(folder)
        assert is_there(found["server"])
        assert found["environment"] == {}
        assert os.getpgid(found["child"]) == os.getpgid(found["server"]) != os.getpgid(0)
        options = EngineOptions("openai", command=command())
        with EngineClient(options, tokenizer, GREEDY, [END], server.url) as client:
            assert len(list(client.ask(questions()))) == len(PROMPTS)
            assert client.check().form.token_ids
        assert server.ended() is None
    wait_until_gone(found["server"], found["child"])
    assert (tmp_path / "logs" / "server.log").read_text() == "a line\n"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_server_is_ended_with_a_run_that_is_killed(tmp_path):
    code = f"""
import pathlib, sys, time
from dft_lightning.engine import Server
folder = pathlib.Path({str(tmp_path)!r})
with Server({command("stubborn")!r}, folder, folder / "log", 20, grace=0.5):
    print("ready", flush=True)
    time.sleep(60)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    try:
        assert run.stdout.readline() == b"ready\n"
        found = written_by(tmp_path)
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    wait_until_gone(found["server"], found["child"])


def test_a_server_that_does_not_start(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(
        InputError, match=r"(?s)has ended with status 1; .*log ends in\na line\nno memory \\x1b\[31mleft$"
    ):
        Server(command("fails"), tmp_path, log, 20).__enter__()
    with pytest.raises(InputError, match=r"(?s)has ended with status 127; .*no-such-program: No such file"):
        Server("no-such-program {folder} {port}", tmp_path, log, 20).__enter__()


def test_a_server_that_never_answers_is_ended(tmp_path):
    server = Server(command("silent"), tmp_path, tmp_path / "log", start_timeout=0.4, grace=5)
    with pytest.raises(
        InputError, match=r"(?s)does not answer at http://localhost:\d+/v1 within 0.4 seconds .*a line$"
    ):
        server.__enter__()
    assert server._process is None


def test_a_server_that_ends_in_the_middle_is_said_to(tmp_path, tokenizer):
    options = EngineOptions("openai", command=command(), retries=0, concurrency=2)
    answered = []

    def ask():
        with (
            Server(command(), tmp_path, tmp_path / "log", 20, grace=0.5) as server,
            EngineClient(options, tokenizer, GREEDY, [END], server.url) as client,
        ):
            for key, _ in client.ask(questions()):
                answered.append(key)
                if len(answered) == 3:
                    os.kill(written_by(tmp_path)["server"], signal.SIGKILL)
                    while server.ended() is None:
                        time.sleep(0.01)

    message = r"(?s)no connection.*; \d+ prompts were answered; .*engine_stub.* has ended by signal 9; .*a line$"
    with pytest.raises(InputError, match=message):
        ask()
    assert len(answered) >= 3


# -- transformers serve ------------------------------------------------------------------------------------------------


def test_transformers_serve(tokenizer, tmp_path, monkeypatch):
    """A real server: what it says, greedily, is what transformers says in process; and it samples."""
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available() or importlib.util.find_spec("transformers.cli.serving") is None:
        pytest.skip("transformers serve needs fastapi and uvicorn, and has completions from some release on")
    from transformers import AutoModelForCausalLM

    folder = resolve("asset://arithmetic-base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer.convert_tokens_to_ids(list(f"^{text}=")) for text in ("123+456", "9+1", "70+81")]
    program = f"{sys.executable} -m transformers.cli.transformers serve {{folder}} --port {{port}}"
    program += " --device cpu --dtype float32"
    options = EngineOptions("openai", command=program, concurrency=2, timeout=30, start_timeout=50)
    asked = [Question(key, prompt, 2, seed=1) for key, prompt in enumerate(prompts)]
    with Server(options.command, Path(folder), tmp_path / "log", options.start_timeout) as server:
        with EngineClient(options, tokenizer, GREEDY, [END], server.url) as client:
            assert client.check(prompts[0]).form == Form(False, "generation_config", True)
            said = model.generate(torch.tensor([prompts[0]]), do_sample=False, max_new_tokens=30)[0, len(prompts[0]) :]
            client.check_model(prompts[0], said.tolist())
            greedy = dict(client.ask(asked))
        strict = GenerationOptions(30, True, temperature=5.0, top_p=0.999, top_k=10)
        with EngineClient(options, tokenizer, strict, [END], server.url) as client:
            sampled = dict(client.ask(asked))
    for key, prompt in enumerate(prompts):
        said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)[0, len(prompt) :].tolist()
        ended = said[-1] == END and len(said) < 30
        text = tokenizer.decode(said, skip_special_tokens=True)
        assert greedy[key] == [Answer(text, None, len(said), ended)] * 2
    assert any(a.text != b.text for a, b in sampled.values())
