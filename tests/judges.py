"""A real HTTP server that answers like OpenAI's, with faults on demand, counting what it does."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-canary-4f1e7d"


class Judge:
    """`faults` maps a word to a list of faults, used up one a request that holds the word; for all
    other requests `answer(conversation)` is what the model says.

    `asked` counts requests and `paid` complete answers, by conversation.
    """

    def __init__(self, answer: Callable[[str], object]) -> None:
        self.answer, self.faults = answer, {}
        self.asked, self.paid = Counter(), Counter()
        self.keys, self.times, self.bodies = set(), [], []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                judge.handle(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        text = body["messages"][0]["content"].split("Conversation: ")[1]
        with self.lock:
            self.asked[text] += 1
            self.bodies.append(body)
            self.times.append((text, time.monotonic()))
            self.keys.add(request.headers["authorization"])
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            fault = next((f.pop(0) for word, f in self.faults.items() if word in text and f), None)
        try:
            self._reply(request, text, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                self.busy -= 1

    def _reply(self, request: BaseHTTPRequestHandler, text: str, fault: object) -> None:
        if fault == "cut":
            request.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"id"')
            request.close_connection = True
            request.connection.close()
        elif isinstance(fault, tuple):
            status, headers, error = fault
            self._send(request, status, headers, {"error": {"message": error}})
        elif fault == "no json":
            self._send(request, 200, {"content-type": "application/json"}, b"<html>busy</html>")
        else:
            if isinstance(fault, float):
                time.sleep(fault)
            message = {"role": "assistant", "content": self.answer(text)}
            usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            found = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
            self._send(request, 200, {}, {**found, "choices": [choice], "usage": usage})
            with self.lock:
                self.paid[text] += 1

    def _send(self, request: BaseHTTPRequestHandler, status: int, headers: dict, body) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        every = {"content-type": "application/json", "content-length": str(len(data))}
        for name, value in {**every, **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)


@contextmanager
def judge_server(answer: Callable[[str], object] = lambda text: "7\nGood.") -> Iterator[Judge]:
    """A `Judge` that listens until the block ends."""
    judge = Judge(answer)
    thread = threading.Thread(target=judge.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.http.shutdown()
        judge.http.server_close()
        thread.join()
