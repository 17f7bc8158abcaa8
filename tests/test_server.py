"""Annotations from an OpenAI-compatible server, which is a process of its own and sometimes fails."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.request

import pytest

from sarm_lib import annotations
from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.annotators import Failure
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
    tries = [len(r.provenance["answers"]["sparse"]["refused"]) + 1 for r in results if isinstance(r, Annotation)]
    assert stats(server)["answers"] - before["answers"] == 2 * len(failures) + sum(tries)


def test_one_bad_episode_fails_alone(server):
    dataset = Clips([20, 20], broken=(0,))
    results = sorted(ask_server(server, dataset).annotate(dataset.episodes), key=lambda result: result.episode)
    assert results[0] == Failure(0, "DatasetError: episode 0, observation.images.front: file-000.mp4 is missing")
    assert isinstance(results[1], Annotation)


def test_it_works_where_an_event_loop_is_running(server):
    async def cell() -> list:
        dataset = Clips([20])
        return list(ask_server(server, dataset).annotate(dataset.episodes))

    (result,) = asyncio.run(cell())
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
