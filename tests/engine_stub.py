"""A small server with the OpenAI completions interface, whose "model" says digits that follow from the prompt, in each
way that servers have, and with each fault. In a thread, or a process of its own: ``engine_stub.py PORT FOLDER``."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# The tokens of asset://arithmetic-base.
TOKENS = "_^$?0123456789+=,|c"
DIGITS, END, COMMA = range(4, 14), 2, 16


@dataclass
class Ways:
    """How a server is. Names of fields are as the client's."""

    models: tuple[str, ...] = ("digits",)
    token_ids: bool = True
    extras: str = "fields"  # "generation_config"; "ignored", "refused": neither is taken
    obeys: tuple[str, ...] = ("stop_token_ids", "temperature", "top_k", "top_p", "logit_bias")
    n: str = "yes"  # "ignored", "same"
    log_probs: str = "own"  # "tempered", "none", "refused", "without end", "content"
    ends: tuple[int, ...] = (END,)  # tokens that it ends at by itself
    shows_end: bool = False
    counts: int = 0  # tokens that it puts into a text prompt
    usage: bool = True
    other: int = 0  # another number is another model
    off: float = 0.0  # added to each log-prob
    longest: int = 12  # of greedy answers


class Refused(Exception):
    pass


def greedy_tokens(prompt, ways):
    draw = random.Random(f"{list(prompt)} {ways.other}")
    said = [draw.choice(DIGITS) for _ in range(draw.randrange(5, ways.longest))]
    return [*said, END, *[draw.choice(DIGITS) for _ in range(60)]]


def sampled_tokens(prompt, seed, temperature):
    draw = random.Random(f"{list(prompt)} {seed} {temperature}")
    said = [draw.choice(DIGITS) for _ in range(draw.randrange(5, 12))]
    return [*said, END, *[draw.choice(DIGITS) for _ in range(60)]]


def log_prob_of(token):
    return -0.1 * (1 + token)


class Stub(ThreadingHTTPServer):
    """A server on a free port of this machine.

    Attributes:
        faults: what goes wrong with the next requests for completions.
        requests: bodies of those that were answered.
        keys: what they were authorised by.
        most: requests under way at once, at most.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, ways, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.ways = ways
        self.faults = []
        self.fault_after = None  # (a number of requests without a fault, the fault of all after these)
        self.granted = 0
        self.requests = []
        self.keys = set()
        self.tried = 0
        self.most = self.under_way = 0
        self.pause = 0.0
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # connections that the client has closed

    def fault(self):
        with self.lock:
            self.tried += 1
            if self.faults:
                return self.faults.pop(0)
            if self.fault_after and self.granted >= self.fault_after[0]:
                return self.fault_after[1]
            self.granted += 1
        return None

    def completion(self, body):
        ways = self.ways
        known = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "logprobs", "logit_bias"}
        known |= {"frequency_penalty", "presence_penalty"}
        others = body.keys() - known
        taken = {"fields": others, "ignored": others, "generation_config": {"generation_config"}, "refused": set()}
        if others - taken[ways.extras]:
            raise Refused(f"unexpected {sorted(others)}")
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = [TOKENS.index(letter) for letter in prompt]
        elif not ways.token_ids:
            raise Refused("prompt must be a string")
        if body["model"] not in ways.models:
            raise Refused(f"no model {body['model']}")
        if "logprobs" in body and ways.log_probs == "refused":
            raise Refused("no logprobs")
        extra = body
        if ways.extras == "generation_config" and "generation_config" in body:
            extra = json.loads(body["generation_config"])
            extra["stop_token_ids"] = extra["eos_token_id"]
        n = body.get("n", 1) if ways.n != "ignored" else 1
        said = [self.choice(prompt, body, extra, i if ways.n == "yes" else 0) for i in range(n)]
        for index, choice in enumerate(said):
            choice["index"] = index
        counted = sum(len(choice.pop("ids")) for choice in said)
        prompt_tokens = len(prompt) + (ways.counts if isinstance(body["prompt"], str) else 0)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": counted, "total_tokens": prompt_tokens + counted}
        whole = {"id": "1", "object": "text_completion", "created": 1, "model": body["model"], "choices": said[::-1]}
        return {**whole, "usage": usage} if ways.usage else whole

    def choice(self, prompt, body, extra, sample):
        ways, temperature = self.ways, body["temperature"] if "temperature" in self.ways.obeys else 0.0
        strict = "top_k" in ways.obeys and extra.get("top_k") == 1
        strict = strict or ("top_p" in ways.obeys and body["top_p"] < 1e-3)
        first = greedy_tokens(prompt, ways)[0]
        tokens = greedy_tokens(prompt, ways)
        if temperature and not strict:
            tokens = sampled_tokens(prompt, body["seed"] + sample, temperature)
        if "logit_bias" in body and "logit_bias" in ways.obeys:
            tokens = [int(next(iter(body["logit_bias"])))] * 100
        ends = {*ways.ends, *(extra.get("stop_token_ids", ()) if "stop_token_ids" in ways.obeys else ())}
        place = next((i for i, token in enumerate(tokens) if token in ends), None)
        finished = place is not None and place < body["max_tokens"]
        ids = tokens[: place + 1] if finished else tokens[: body["max_tokens"]]
        shown = ids[:-1] if finished and not (ways.shows_end and ids[-1] != END) else ids
        text = "".join(TOKENS[token] for token in shown if token != END)
        found = None
        if "logprobs" in body and ways.log_probs in ("own", "tempered", "without end", "content"):
            cold = 1.0 if ways.log_probs != "tempered" or not body["temperature"] else body["temperature"]
            scored = ids[:-1] if ways.log_probs == "without end" and finished else ids
            values = [log_prob_of(token) / cold + ways.off for token in scored]
            likeliest = [{TOKENS[first]: log_prob_of(first) / cold + ways.off}] * len(scored)
            tokens_shown = [TOKENS[token] for token in scored]
            found = {"tokens": tokens_shown, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": []}
            if ways.log_probs == "content":
                top = [[{"token": token, "logprob": value} for token, value in each.items()] for each in likeliest]
                names, rows = ("token", "logprob", "top_logprobs"), zip(tokens_shown, values, top, strict=True)
                found = {"content": [dict(zip(names, row, strict=True)) for row in rows]}
        return {"text": text, "finish_reason": "stop" if finished else "length", "logprobs": found, "ids": ids}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's second part waits for 40 ms

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path != "/v1/models":
            return self.answer(404, {"error": "no such path"})
        return self.answer(
            200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.server.ways.models]}
        )

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.under_way += 1
            server.keys.add(self.headers["Authorization"])
            server.most = max(server.most, server.under_way)
        try:
            fault = server.fault()
            time.sleep(server.pause)
            if fault is None:
                answer = server.completion(body)
                with server.lock:
                    server.requests.append(body)
                self.answer(200, answer)
            else:
                getattr(self, f"fault_{fault}")(body)
        except Refused as error:
            self.answer(422, {"error": {"message": str(error)}})
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, status, value, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers):
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def fault_429(self, body):
        self.answer(429, {"error": {"message": "too many"}}, [("retry-after-ms", "1")])

    def fault_500(self, body):
        self.answer(503, {"error": {"message": "it is loading"}}, [("retry-after-ms", "1")])

    def fault_401(self, body):
        self.answer(401, {"error": {"message": "no key"}})

    def fault_400(self, body):
        self.answer(400, {"error": {"message": "too long a prompt"}})

    def fault_no_json(self, body):
        self.answer(200, b'{"choices": [{"text": "12')

    def fault_a_list(self, body):
        self.answer(200, [1, 2])

    def fault_no_choices(self, body):
        self.answer(200, {**self.server.completion(body), "choices": []})

    def fault_null_choices(self, body):
        self.answer(200, {"id": "1", "object": "text_completion"})

    def fault_no_reason(self, body):
        whole = self.server.completion(body)
        self.answer(200, {**whole, "choices": [{**choice, "finish_reason": None} for choice in whole["choices"]]})

    def fault_nan(self, body):
        whole = self.server.completion(body)
        for choice in whole["choices"]:
            choice["logprobs"]["token_logprobs"][0] = float("nan")
        self.answer(200, whole)

    def fault_cut(self, body):
        data = json.dumps(self.server.completion(body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:20])
        self.close_connection = True

    def fault_gone(self, body):
        self.close_connection = True

    def fault_slow(self, body):
        self.server.released.wait(5)
        self.close_connection = True


@contextmanager
def serving(**ways):
    """A stub in a thread."""
    stub = Stub(Ways(**ways))
    thread = threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.released.set()
        stub.shutdown()
        stub.server_close()
        thread.join(5)


def seeds(stub):
    """How often each seed was asked with."""
    return Counter(body["seed"] for body in stub.requests)


def main(port, folder, *how):
    """A process: says so, starts a child, and serves a model of the folder's name."""
    print("a line", flush=True)
    if "fails" in how:
        sys.exit("no memory \x1b[31mleft")
    if "silent" in how:
        time.sleep(60)
    if "stubborn" in how:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    with open(os.path.join(folder, "pids.json"), "w") as file:
        ranks = {name: os.environ[name] for name in ("RANK", "MASTER_ADDR") if name in os.environ}
        json.dump({"server": os.getpid(), "child": child, "environment": ranks}, file)
    Stub(Ways(models=(folder,)), int(port)).serve_forever(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
