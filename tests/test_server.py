"""Annotations from an OpenAI-compatible server, which is a process of its own and sometimes fails."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm_lib import annotations, annotators
from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.annotators import Failure, question
from sarm_lib.annotators.server import DECODED, LONGEST_PAUSE, ServerAnnotator, _Pace
from tests.conftest import ROOT
from tests.tiny_vlm import VOCABULARY, Clips, ask_server, kill_and_go_on

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LENGTHS = [20, 14, 33, 16, 25, 18]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server that fails every fourth time."""
    folder = tmp_path_factory.mktemp("server") / "tiny"
    command = [sys.executable, "-m", "tests.openai_server", str(folder), "--faults", "4"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    ) as process:
        yield process.stdout.readline().strip()
        process.kill()


def stats(server: str) -> dict:
    with urllib.request.urlopen(f"{server}/stats") as reply:
        return json.load(reply)


def run(coroutine):
    """In a thread of its own: the browser of other tests leaves an event loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def test_all_episodes_are_annotated_though_the_server_fails(server):
    dataset = Clips(LENGTHS)
    before = stats(server)
    results = list(ask_server(server, dataset).annotate(dataset.episodes))
    after = stats(server)
    assert sorted(result.episode for result in results) == list(range(len(LENGTHS)))
    for result in results:
        annotations.validate(result, VOCABULARY, LENGTHS[result.episode])
        assert result.provenance["answers"]["dense"]["refused"] == []
    assert after["answers"] - before["answers"] == 2 * len(LENGTHS)
    assert after["faults"] - before["faults"] >= 3  # one of each kind
    assert 3 <= after["max_in_flight"] <= 4


def test_an_invalid_answer_is_asked_for_again_and_then_a_failure(server):
    """A schema lets times through that do not increase, and a first one that is not 0."""
    dataset = Clips([6] * 8)
    names = {"sparse": VOCABULARY["sparse"]}
    asked = ask_server(server, dataset, use_grammar=False, max_attempts=2, vocabulary=names)
    before = stats(server)
    results = sorted(asked.annotate(dataset.episodes), key=lambda result: result.episode)
    failures = [result for result in results if isinstance(result, Failure)]
    assert failures
    assert all("sparse: no valid answer in 2 tries; the last: segment " in failure.reason for failure in failures)
    said = [result.provenance["answers"]["sparse"] for result in results]
    for result, answers in zip(results, said):
        assert answers["prompt"].startswith("The video shows")
        assert (answers["answer"] is None) == (len(answers["refused"]) == 2) == isinstance(result, Failure)
        for wrong in answers["refused"]:
            with pytest.raises(AnnotationError) as error:
                question.parse(wrong["answer"], names["sparse"], 6, dataset.fps)
            assert wrong["reason"] == str(error.value)
    answered = sum(len(answers["refused"]) + (answers["answer"] is not None) for answers in said)
    assert stats(server)["answers"] - before["answers"] == answered


def test_one_bad_episode_fails_alone(server):
    dataset = Clips([20, 20], broken=(0,))
    results = sorted(ask_server(server, dataset).annotate(dataset.episodes), key=lambda result: result.episode)
    assert results[0] == Failure(0, "DatasetError: episode 0, observation.images.front: file-000.mp4 is missing")
    assert isinstance(results[1], Annotation)


def test_the_estimate_counts_what_is_sent(server):
    dataset = Clips([20, 41])
    asked = ask_server(server, dataset)
    pictures = [len(asked.shown(episode)) for episode in dataset.episodes]
    assert pictures == [4, 9]
    sent = sum(len(picture) for episode in dataset.episodes for picture in asked.pictures(episode))
    estimate = asked.estimate(dataset.episodes)
    assert "tiny-vlm: 4 requests or more, 4 at once, with 26 pictures in all: about 0.0 MB" in estimate
    assert sent < 100_000
    dataset.features[dataset.image_keys[0]]["shape"] = (480, 640, 3)
    # of two requests the pictures, nine at most, as they are and in the body; of two episodes the raw frames
    held = 2 * 2 * 9 * 480 * 640 * 0.35 * 4 / 3 + 2 * 9 * 480 * 640 * 3
    assert f"1.3 MB a request and {held / 1e6:.0f} MB of memory" in asked.estimate(dataset.episodes)


def test_frames_are_encoded_once_for_all_heads_and_tries_and_then_let_go(server, monkeypatch):
    """Raw frames take six times the memory of what is sent of them."""
    dataset, raw, encoded, asked_for = Clips([6] * 6), [], [], []

    def read_frames(*given):
        frames = Clips.read_frames(dataset, *given)
        raw.append(weakref.ref(frames))
        return frames

    def content(question, pictures):
        parts = ServerAnnotator.content(asked, question, pictures)
        sent = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        assert sent == pictures and len(sent) == len(asked.shown(question.episode))
        asked_for.append([frames() is None for frames in raw])
        return parts

    dataset.read_frames = read_frames
    monkeypatch.setattr("sarm_lib.annotators.server.jpeg", lambda frame: encoded.append(1) or question.jpeg(frame))
    asked = ask_server(server, dataset, use_grammar=False, max_attempts=3, in_flight=1)
    asked.content = content
    results = list(asked.annotate(dataset.episodes))
    tries = sum(len(s["refused"]) for result in results for s in result.provenance["answers"].values())
    assert tries > 0 and len(asked_for) > len(dataset.episodes)
    assert all(gone for at_that_time in asked_for for gone in at_that_time)
    assert len(encoded) == sum(len(asked.shown(episode)) for episode in dataset.episodes)


def test_however_many_episodes_are_in_flight_few_have_their_raw_frames_in_memory(server):
    dataset, raw, at_once = Clips([20] * 12), [], []

    def read_frames(*given):
        frames = Clips.read_frames(dataset, *given)
        raw.append(weakref.ref(frames))
        time.sleep(0.05)
        at_once.append(sum(held() is not None for held in raw))
        return frames

    dataset.read_frames = read_frames
    assert len(list(ask_server(server, dataset, in_flight=12).annotate(dataset.episodes))) == 12
    assert max(at_once) == DECODED


class Crowded(BaseHTTPRequestHandler):
    """Waits for two requests, has too many for a second, answers one of them after a moment, and then every other."""

    protocol_version = "HTTP/1.1"
    answer = '{"segments": [{"start": 0.0, "subtask": "pick up the nut"}]}'

    def do_GET(self) -> None:
        self.reply(404, {"error": {"message": "no list of models"}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.arrivals.append(time.monotonic())
        if len(self.server.arrivals) <= 2:
            if self.server.both.wait() == 0:
                self.server.refused_at = time.monotonic()
                self.reply(429, {"error": {"message": "too many"}}, **{"retry-after": "1"})
                return
            time.sleep(0.3)
        message = {"role": "assistant", "content": self.answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.reply(
            200, {"id": "0", "object": "chat.completion", "created": 0, "model": "tiny-vlm", "choices": [choice]}
        )

    def reply(self, status: int, body: dict, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def test_when_one_is_told_that_there_are_too_many_all_wait():
    crowded = ThreadingHTTPServer(("127.0.0.1", 0), Crowded)
    crowded.arrivals, crowded.both, crowded.daemon_threads = [], threading.Barrier(2), True
    threading.Thread(target=crowded.serve_forever, daemon=True).start()
    dataset, names = Clips([20] * 6), {"sparse": VOCABULARY["sparse"]}
    asked = ask_server(f"http://127.0.0.1:{crowded.server_port}", dataset, in_flight=2, vocabulary=names)
    results = list(asked.annotate(dataset.episodes))
    crowded.shutdown()
    crowded.server_close()
    assert [type(result) for result in results] == [Annotation] * 6
    assert len(crowded.arrivals) == 7  # the refused one came again
    assert min(crowded.arrivals[2:]) - crowded.refused_at > 0.99


class Odd(Crowded):
    """Lists its `models`, answers the first `late` requests too late, and says `body`, or what is `instead` of it that time."""

    def do_GET(self) -> None:
        self.say(self.server.models)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.arrivals.append(time.monotonic())
        if len(self.server.arrivals) <= self.server.late:
            time.sleep(0.6)
        self.say(self.server.instead.get(len(self.server.arrivals), self.server.body))

    def say(self, body) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "text/html" if data.startswith(b"<") else "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever asked has gone
            self.wfile.write(data)


@contextlib.contextmanager
def odd_server(body, late: int = 0):
    """A server that answers so, its first answers too late for a timeout of a third of a second."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.arrivals, server.late, server.body, server.instead, server.daemon_threads = [], late, body, {}, True
    model = {"id": "tiny-vlm", "object": "model", "created": 0, "owned_by": ""}
    server.models = {"object": "list", "data": [model]}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def completion(text: str) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "0", "object": "chat.completion", "created": 0, "model": "tiny-vlm", "choices": [choice]}


@pytest.mark.parametrize("late", [1, 2])
def test_a_request_that_runs_out_of_time_is_sent_once_more(late):
    dataset, names = Clips([20]), {"sparse": VOCABULARY["sparse"]}
    with odd_server(completion(Crowded.answer), late) as (server, address):
        asked = ask_server(address, dataset, vocabulary=names, timeout=0.3)
        (result,) = asked.annotate(dataset.episodes)
        assert len(server.arrivals) == 2
    if late == 1:
        assert isinstance(result, Annotation)
    else:
        assert "no answer within 0.3 seconds, 2 times at most (annotate.server_timeout" in result.reason


def test_what_is_no_server_of_the_kind_is_said_once():
    dataset = Clips([20, 20])
    with odd_server(b"<html>nginx</html>") as (server, address):
        with pytest.raises(AnnotationError, match=r"no OpenAI-compatible server: .*<html>nginx.*/v1 in the URL"):
            list(ask_server(address, dataset, in_flight=1).annotate(dataset.episodes))
        assert len(server.arrivals) == 1


@pytest.mark.parametrize("models", [b"<html>", {}, {"data": None}, [], {"data": ["tiny-vlm"]}])
def test_whatever_is_said_of_models_is_one_clear_error(models):
    """Where such a server is the second opinion, anything else would stop the stage."""
    dataset = Clips([20])
    with odd_server(completion(Crowded.answer)) as (server, address):
        server.models = models
        with pytest.raises(AnnotationError, match=r"no OpenAI-compatible server: it has no list of models"):
            list(ask_server(address, dataset).annotate(dataset.episodes))
        assert not server.arrivals


@pytest.mark.parametrize("page", [b"<html>gateway</html>", b'{"id": "0", "obj'])
def test_a_gateway_s_page_in_between_is_waited_for(page):
    dataset, names = Clips([20] * 3), {"sparse": VOCABULARY["sparse"]}
    with odd_server(completion(Crowded.answer)) as (server, address):
        server.instead = {2: page}
        asked = ask_server(address, dataset, vocabulary=names, in_flight=1)
        results = list(asked.annotate(dataset.episodes))
        assert [type(result) for result in results] == [Annotation] * 3 and len(server.arrivals) == 4
        server.instead = dict.fromkeys(range(5, 20), page)
        asked.max_retries = 1
        results = list(asked.annotate(dataset.episodes))
        assert [type(result) for result in results] == [Failure] * 3 and "its answer is" in results[0].reason


def test_an_error_under_the_status_of_success_is_waited_for_and_told():
    dataset, names = Clips([20] * 2), {"sparse": VOCABULARY["sparse"]}
    with odd_server(completion(Crowded.answer)) as (server, address):
        server.instead = {1: b'{"error": {"message": "overloaded"}}'}
        asked = ask_server(address, dataset, vocabulary=names, in_flight=1)
        results = list(asked.annotate(dataset.episodes))
        assert [type(result) for result in results] == [Annotation] * 2 and len(server.arrivals) == 3
        server.instead = dict.fromkeys(range(4, 20), server.instead[1])
        asked.max_retries = 1
        failure, _ = asked.annotate(dataset.episodes)
        assert "answers with an error: {'message': 'overloaded'}" in failure.reason
        server.instead = dict.fromkeys(range(1, 40), b'{"error": {"message": "who are you?", "code": 401}}')
        arrived = len(server.arrivals)
        with pytest.raises(AnnotationError, match=r"refuses: .*who are you\?.*OPENAI_API_KEY"):
            list(asked.annotate(dataset.episodes))
        assert len(server.arrivals) == arrived + 1, "this will not pass"


def test_a_server_s_own_words_are_told():
    import httpx
    import openai

    from sarm_lib.annotators.server import _told

    for body, words in (
        ('{"detail": "image too large"}', "image too large"),
        ('{"error": "no such format"}', "no such format"),
    ):
        response = httpx.Response(400, text=body, request=httpx.Request("POST", "http://there/v1"))
        assert words in _told(openai.BadRequestError("Error code: 400", response=response, body=None))
    body = {"message": "too long", "type": "x" * 1000}
    response = httpx.Response(400, json={"error": body}, request=httpx.Request("POST", "http://there/v1"))
    assert (
        _told(openai.BadRequestError("Error code: 400 - too long", response=response, body=body))
        == "Error code: 400 - too long"
    )
    assert len(_told(ValueError("x" * 100_000))) < 400
    lost = openai.APIConnectionError(request=httpx.Request("POST", "http://there/v1"))
    lost.__cause__ = httpx.UnsupportedProtocol("Request URL is missing an 'http://'")
    assert "missing an 'http://'" in _told(lost) and _told(ValueError("plain")) == "plain"


@pytest.mark.parametrize("message", [None, {"content": ["parts"]}, {}])
def test_an_answer_without_a_text_is_no_valid_one(message):
    dataset, names = Clips([20]), {"sparse": VOCABULARY["sparse"]}
    body = completion("")
    body["choices"][0]["message"] = message and {"role": "assistant", **message}
    with odd_server(body) as (_, address):
        (failure,) = ask_server(address, dataset, vocabulary=names, max_attempts=2).annotate(dataset.episodes)
    assert "no valid answer in 2 tries; the last: the answer is not JSON" in failure.reason


def test_half_a_pair_of_surrogates_in_an_answer_can_be_kept_and_read(tmp_path):
    """A model may write half an emoji, and JSON can say it."""
    dataset, names = Clips([20], root=tmp_path / "dataset"), {"sparse": VOCABULARY["sparse"]}
    with odd_server(completion("\ud83d and then")) as (_, address):
        asked = ask_server(address, dataset, vocabulary=names, max_attempts=1)
        found, (failure,) = annotators.run(asked, dataset, names, tmp_path / "work")
    assert not found and failure.provenance["answers"]["sparse"]["refused"][0]["answer"] == "? and then"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_a_crowd_that_is_refused_together_makes_one_pause_and_the_next_a_longer_one(crowds):
    """Without a word of the server's on how long."""

    async def pauses() -> list[float]:
        pace, clock, found = _Pace(), asyncio.get_running_loop(), []
        for crowd in crowds:
            before = clock.time()
            for _ in range(crowd):
                await pace.hear(SimpleNamespace(status_code=429, headers={}))
            found.append(pace.over - before)
            pace.over = 0.0  # as if it were over
        await pace.hear(SimpleNamespace(status_code=200, headers={}))
        await pace.hear(SimpleNamespace(status_code=503, headers={"retry-after": "soon"}))
        return [*found, pace.over - clock.time()]

    expected = [min(0.5 * 2**i, LONGEST_PAUSE) for i in range(len(crowds))]
    assert run(pauses()) == pytest.approx([*expected, 0.5], abs=0.1)


@given(st.floats() | st.text(max_size=5))
def test_whatever_a_server_asks_for_no_pause_is_endless(value):
    async def pause() -> float:
        pace = _Pace()
        await pace.hear(SimpleNamespace(status_code=429, headers={"retry-after": str(value)}))
        return pace.over - asyncio.get_running_loop().time()

    assert run(pause()) <= LONGEST_PAUSE


def test_it_works_where_an_event_loop_is_running(server):
    async def cell() -> list:
        dataset = Clips([20])
        return list(ask_server(server, dataset).annotate(dataset.episodes))

    (result,) = run(cell())
    assert isinstance(result, Annotation)


def test_asking_can_be_stopped(server):
    dataset = Clips([20] * 50)
    results = ask_server(server, dataset).annotate(dataset.episodes)
    before = stats(server)["answers"]
    assert isinstance(next(results), Annotation)
    results.close()
    assert stats(server)["answers"] - before < 20


def test_no_server_is_one_clear_error(server):
    dataset = Clips([20, 20])
    with pytest.raises(AnnotationError, match=r"no server answers at http://127.0.0.1:9/v1 .*`vllm serve tiny-vlm"):
        list(ask_server("http://127.0.0.1:9", dataset).annotate(dataset.episodes))
    with pytest.raises(AnnotationError, match="has no model 'another'; it has tiny-vlm"):
        list(ask_server(server, dataset, model="another").annotate(dataset.episodes))
    with pytest.raises(AnnotationError, match=r"refuses: .*no /v1/v1/chat/completions here.*/v1 in the URL"):
        list(ask_server(server, dataset, url=f"{server}/v1/v1").annotate(dataset.episodes))


def test_a_killed_run_goes_on_where_it_was(server, tmp_path):
    kill_and_go_on("ask_server", server, tmp_path)
