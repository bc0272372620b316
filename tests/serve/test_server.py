"""The command itself: it starts, answers, lets answers under way finish when told to stop, and says what is wrong."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from lorasmith.cli import evaluate
from lorasmith.cli.serve import command
from lorasmith.errors import SettingsError
from lorasmith.serve.batch import FailedError
from lorasmith.serve.keys import Keys, read_keys
from serve.conftest import open_service, serving

QUESTION = [{"role": "user", "content": "What is 1 plus 1?"}]


def test_sigterm_lets_an_answer_finish(trained_run, tiny_base_folder):
    words = ["serve", "--run", str(trained_run), "--port", "0", "--device", "cpu", "--dtype", "float32"]
    program = [sys.executable, "-c", "from lorasmith.cli.main import main; main()", *words]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Serving faq, "), process.stderr.read()
            url = line.split()[-1]
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                # Forbidden to say its end token, the model has to go on to the last token allowed.
                format = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
                stream = client.chat.completions.create(
                    model="faq", messages=QUESTION, max_tokens=200, stream=True, response_format=format
                )
                next(stream)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                assert process.poll() is None
                chunks = list(stream)
                assert chunks[-1].choices[0].finish_reason == "length"
        finally:
            process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert log.count('"event"') == 1, log
    (line,) = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert line["completion_tokens"] == 200
    assert "plus" not in log  # contents are not logged


LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 300}


def test_who_is_not_answered_in_time_is_told_so(tiny_base_folder):
    service = open_service(tiny_base_folder, {}, drain_seconds=1)
    service.models.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    format = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 400, "response_format": format}
    replies = {}

    def ask(stream):
        replies[stream] = httpx2.post(
            f"{url}/v1/chat/completions", json={**body, "stream": stream}, timeout=30
        )

    threads = [threading.Thread(target=ask, args=[stream]) for stream in (False, True)]
    with serving(service) as url:
        for thread in threads:
            thread.start()
        while service.scheduler.num_running < 2:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert (replies[False].status_code, replies[False].json()["error"]["code"]) == (503, "server_stopping")
    *_, fault, end = [line for line in replies[True].text.splitlines() if line]
    assert json.loads(fault.removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert end == "data: [DONE]"
    page = service.metrics.page().decode()
    assert 'lorasmith_requests_total{model="tiny",status="503"} 2.0' in page
    assert 'model="",status="503"' not in page


def test_a_client_that_leaves_is_not_answered_further(tiny_base_folder):
    service = open_service(tiny_base_folder, {})
    service.models.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with serving(service) as url:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 400}
        long = {"response_format": {"type": "json_schema", "json_schema": {"name": "l", "schema": LONG}}}
        with httpx2.stream(
            "POST", f"{url}/v1/chat/completions", json={**body, **long, "stream": True}
        ) as reply:
            next(reply.iter_lines())
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/v1/chat/completions", json={**body, **long}, timeout=0.5)
        end = time.monotonic() + 3  # 400 tokens would take four seconds and more
        while service.scheduler.num_running and time.monotonic() < end:
            time.sleep(0.01)
        page = httpx2.get(f"{url}/metrics").text
    assert "lorasmith_cancelled_total 2.0" in page
    assert page.count('status="499"} 1.0') + page.count('status="499"} 2.0') == 1


def test_a_client_that_leaves_while_it_asks_is_no_fault_of_ours(tiny_base_folder):
    service = open_service(tiny_base_folder, {})
    with serving(service) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            )
            connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"model":'.encode())
        end = time.monotonic() + 5
        while (page := httpx2.get(f"{url}/metrics").text).count("status=") == 0 and time.monotonic() < end:
            time.sleep(0.01)
    assert 'lorasmith_requests_total{model="",status="499"} 1.0' in page
    assert 'status="500"' not in page


@pytest.mark.parametrize("stream", [False, True])
def test_a_defect_inside_a_reply_is_counted_once_as_ours(tiny_base_folder, monkeypatch, caplog, stream):
    monkeypatch.setattr("lorasmith.serve.replies.ChatReply.add", lambda *_: 1 / 0)
    caplog.set_level("INFO", "lorasmith.serve")
    service = open_service(tiny_base_folder, {})
    with serving(service) as url:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 4, "stream": stream}
        with pytest.raises(httpx2.RemoteProtocolError) if stream else nullcontext():
            reply = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        page = httpx2.get(f"{url}/metrics").text
    assert [line for line in page.splitlines() if line.startswith("lorasmith_requests_total{")] == [
        'lorasmith_requests_total{model="tiny",status="500"} 1.0'
    ]
    assert [record.fields["status"] for record in caplog.records if record.msg == "request"] == [500]


def test_warming_up_asks_no_more_than_may_wait(tiny_base_folder, adapters):
    service = open_service(tiny_base_folder, adapters, max_waiting=2)
    service.warm_up()
    service.close()


def test_a_server_that_cannot_answer_a_word_says_so_and_does_not_start(tiny_base_folder):
    service = open_service(tiny_base_folder, {})

    def fail(*_):
        raise MemoryError

    service.models.model.register_forward_pre_hook(fail)
    with pytest.raises(FailedError, match="could not be computed: MemoryError"):
        service.warm_up()
    service.close()


def test_a_full_server_answers_429_with_a_time(tiny_base_folder):
    service = open_service(tiny_base_folder, {}, max_rows=1, max_waiting=1)
    go = threading.Event()
    service.models.model.register_forward_pre_hook(lambda *_: go.wait(20) and None)
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 2}
    with serving(service) as url:
        replies = []
        threads = [
            threading.Thread(
                target=lambda: replies.append(
                    httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=20)
                )
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
            while not (
                service.scheduler.num_running == 1 and service.scheduler.num_waiting == threads.index(thread)
            ):
                time.sleep(0.005)
        refused = httpx2.post(f"{url}/v1/chat/completions", json=body)
        go.set()
        for thread in threads:
            thread.join()
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["Retry-After"]) >= 1
    assert [reply.status_code for reply in replies] == [200, 200]


def test_evaluate_works_against_it(tiny_base_folder, trained_run, tmp_path, capsys):
    rows = [{"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with serving(open_service(tiny_base_folder, {"faq": trained_run})) as url:
        evaluate.command(endpoint=f"{url}/v1", data=tmp_path / "rows.json", max_tokens=8)
    assert "faq at http://127.0.0.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 99999}, "--port 99999: Input should be less than or equal to 65535"),
        ({"host": "0.0.0.0"}, "other machines reach this server, and it has no API keys"),
        ({"max_rows": 0, "chunk_tokens": 1}, "--max-rows 0: .*\n.*--chunk-tokens 1: "),
        ({}, "Nothing to serve"),
    ],
)
def test_wrong_options_are_said(options, message, monkeypatch):
    monkeypatch.delenv("LORASMITH_API_KEYS", raising=False)
    with pytest.raises(SettingsError, match=message):
        command(**options)


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n" + "a" * 16 + "\n\n")
    keys = read_keys(file, {"LORASMITH_API_KEYS": "b" * 16 + ", " + "c" * 16})
    assert [keys.admit(f"Bearer {letter * 16}") for letter in "abcd"] == [True, True, True, False]
    assert repr(keys) == "Keys(3 of them)"
    assert not read_keys(None, {})
    assert Keys().admit(None)
    file.write_text("# none\n")
    with pytest.raises(SettingsError, match=r"holds none. Write one a line"):
        read_keys(file, {})
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none", {})
    with pytest.raises(SettingsError, match="shorter than 16 characters") as short:
        Keys(["hush"])
    assert "hush" not in str(short.value)
