"""An OpenAI-compatible server is asked as OpenAI's is; whatever it does wrong is said."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lorasmith.data.example import Message
from lorasmith.errors import EndpointError
from lorasmith.evaluation.answers import evaluate_answers
from lorasmith.evaluation.endpoint import Endpoint
from lorasmith.evaluation.questions import EvaluationRow, ask
from lorasmith.evaluation.statistics import Count
from lorasmith.generation.sampling import SamplingSettings

SHORT = SamplingSettings(max_tokens=9)


class Server(ThreadingHTTPServer):
    """A fake endpoint: ``replies`` are by question, and every request is noted."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.replies, self.models, self.status = [], {}, ["tiny"], 200

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        question = body["messages"][-1]["content"]
        self.reply(self.server.replies.get(question, complete(f"Answer to {question}")))

    def reply(self, value):
        content = json.dumps(value).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def complete(text, reason="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return {"choices": [choice], "usage": {"completion_tokens": 4}}


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_answers_come_back_in_order_and_are_judged(server):
    server.replies = {"q3": complete("on and on", "length"), "q5": complete(None)}
    rows = [ask(f"q{i}", "x", f"q{i}") for i in range(8)]
    seen = []
    endpoint = Endpoint(server.url + "/")
    report = evaluate_answers(endpoint, rows, sampling=SHORT, progress=lambda *at: seen.append(at))
    assert endpoint.model == "tiny"
    assert (report.right, report.stopped) == (Count(6, 8), Count(7, 8))
    assert [record.answer for record in report.records[2:6]] == [
        "Answer to q2",
        "on and on",
        "Answer to q4",
        "",
    ]
    assert report.records[0].num_tokens == 4
    assert seen[-1] == (8, 8)


def test_a_request_is_as_openai_wants_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = (Message("system", "Be kind."), Message("user", "Sum up.", "A text."))
    endpoint = Endpoint(server.url + "/chat/completions", model="other")
    evaluate_answers(
        endpoint, [EvaluationRow(asked, "x")], sampling=SamplingSettings(max_tokens=9, stop=("###",))
    )
    ((path, authorization, body),) = server.requests
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "other",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Sum up.\n\nA text."},
        ],
        "temperature": 0,
        "top_p": 1,
        "max_tokens": 9,
        "stop": ["###"],
    }


def test_what_a_server_does_wrong_is_said(server):
    endpoint = Endpoint(server.url)
    server.replies = {"q": {"error": "no such model"}}
    with pytest.raises(
        EndpointError, match=r"does not answer as OpenAI's chat completions do: .*no such model"
    ):
        endpoint.ask_many([[Message("user", "q")]], sampling=SHORT)
    server.replies = {"q": ["a list"]}
    with pytest.raises(EndpointError, match="gave no JSON object"):
        endpoint.ask_many([[Message("user", "q")]], sampling=SHORT)
    server.status = 401
    with pytest.raises(EndpointError, match=r"refused with 401: .* set OPENAI_API_KEY"):
        endpoint.ask_many([[Message("user", "q")]], sampling=SHORT)
    server.status, server.models = 200, []
    with pytest.raises(EndpointError, match=r"lists no model\. Name the one to ask: --endpoint-model"):
        Endpoint(server.url)


def test_a_server_that_is_not_there_is_said_to_be_so():
    with pytest.raises(EndpointError, match=r"cannot be asked: .* Is the server running"):
        Endpoint("http://127.0.0.1:9/v1")
    with pytest.raises(EndpointError, match="is no URL of an endpoint"):
        Endpoint("127.0.0.1:8000")
