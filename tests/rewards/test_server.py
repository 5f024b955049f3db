"""The reward server as OpenRLHF uses it: a real one on a free loopback port, asked by a real client."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltarl.rewards import VerifierHost
from deltarl.rewards.server import MAX_REQUEST_BYTES, RewardServer, response_of

PROMPT = "<|im_start|>user\nWhat is 2+2? Put it in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def server():
    with RewardServer(port=0) as server, VerifierHost("math", workers=2) as server.verifiers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield server
        server.stop(5.0)


def ask(server, body, path="/get_reward", headers=None, method="POST"):
    """(status, answer) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def batch(*responses, labels):
    """What OpenRLHF posts: prompt and response decoded together, special tokens and all."""
    return {
        "query": [PROMPT + response + "<|im_end|>" for response in responses],
        "prompts": [PROMPT] * len(responses),
        "labels": labels,
    }


def test_rewards_of_a_batch(server):
    responses = ["2+2 is \\boxed{4}", "\\boxed{5}", "I would rather talk of something else today."]
    status, answer = ask(server, batch(*responses, labels=["4", 4, ["3", "4"]]))
    assert status == 200
    assert answer == {
        "rewards": [1.0, 0.0, 0.0],
        "scores": [1.0, 0.0, 0.0],
        "extra_logs": {"correct": [1.0, 0.0, 0.0], "no_answer": [0.0, 0.0, 1.0], "failed": [0.0, 0.0, 0.0]},
    }


def test_many_requests_at_a_time(server):
    def one(number):
        return ask(server, batch(f"\\boxed{{{number}}}", labels=[str(number - number % 2)]))

    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(one, range(200)))
    assert [answer["rewards"] for _, answer in answers] == [[1.0], [0.0]] * 100


def test_health(server):
    ask(server, batch("\\boxed{4}", labels=["4"]))
    status, answer = ask(server, None, "/health", method="GET")
    assert (status, answer["status"], answer["verifier"]) == (200, "ok", "math")
    assert answer["verdicts"]["correct"] >= 1


GOOD = batch("\\boxed{4}", labels=["4"])
REFUSED = {
    "not JSON": (b"{", 400, "not JSON"),
    "too deep": (b"[" * 100_000, 400, "not JSON"),
    "a list": ([], 422, "must be an object"),
    "no query": ({"prompts": [], "labels": []}, 422, "query must be"),
    "empty": ({"query": [], "prompts": [], "labels": []}, 422, "query must be"),
    "numbers": ({**GOOD, "query": [4]}, 422, "query must be"),
    "no labels": ({**GOOD, "labels": None}, 422, "--data.label_key"),
    "too few labels": ({**GOOD, "labels": []}, 422, "1 query, 1 prompts, 0 labels"),
    "object as label": ({**GOOD, "labels": [{}]}, 422, "labels[0] must be"),
    "unusable label": ({**GOOD, "labels": ["\\frac{"]}, 422, "labels[0] '\\\\frac{' is unusable"),
}


@pytest.mark.parametrize(("body", "status", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(server, body, status, says):
    got, answer = ask(server, body)
    assert got == status
    assert says in answer["error"]
    assert "\n" not in answer["error"]
    assert ask(server, GOOD)[1]["rewards"] == [1.0], "the server goes on"


def test_large_requests_are_refused_unread(server):
    status, answer = ask(server, b" " * (MAX_REQUEST_BYTES + 1))
    assert (status, str(MAX_REQUEST_BYTES) in answer["error"]) == (413, True)
    assert ask(server, b"{}", headers={"Content-Length": "9" * 400})[0] == 413


def test_paths_and_lengths(server):
    assert ask(server, GOOD, "/score")[0] == 404
    assert ask(server, None, "/", method="GET")[0] == 404
    assert ask(server, None, headers={"Content-Length": "four"})[0] == 411


def test_hostile_rows_are_answered(server):
    responses = ["\\boxed{9^{9^{9^9}}}", "\\boxed{\ud800}", "\x00\\boxed{4}", "\\boxed{" * 20_000]
    status, answer = ask(server, batch(*responses, labels=["7"] * 4))
    assert (status, answer["rewards"]) == (200, [0.0] * 4)


@pytest.mark.parametrize(
    ("query", "prompt", "response"),
    [
        ("<s>2+2? 4</s>", "2+2?", " 4"),
        (PROMPT + "x<|im_end|><|endoftext|>\n", PROMPT, "x"),
        (
            "beginning, which a prompt that is too long for the model has lost: assistant\n4",
            "It has no beginning, which a prompt that is too long for the model has lost: assistant\n",
            "4",
        ),
        ("p: p: 4", "p:", " p: 4"),
        ("4", "", "4"),
        ("a <|b|> c", "", "a <|b|> c"),
    ],
)
def test_response_of_a_query(query, prompt, response):
    assert response_of(query, prompt) == response


def start(*arguments):
    """The command as a process of its own, and the port that it says it serves at."""
    command = [sys.executable, "-P", "-m", "deltarl", "verify", "--serve", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/get_reward", line)
    assert found, line
    return process, int(found[1])


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as listed:
        direct = listed.read().split()
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as listed:
            direct += listed.read().split()
    return {int(child) for child in direct}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_command_stops_without_leaving_a_process(number, code):
    process, port = start("--port", "0", "--workers", "2")
    workers = children(process.pid)
    assert len(workers) == 2
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/get_reward", json.dumps(GOOD))
    assert json.loads(connection.getresponse().read())["rewards"] == [1.0]
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "")
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]


def test_port_in_use(capsys):
    from deltarl.rl.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["verify", "--serve", "--port", str(taken.getsockname()[1])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "in use" in line
    assert "--port" in line
