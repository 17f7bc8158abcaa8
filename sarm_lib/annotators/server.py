"""Annotations from any OpenAI-compatible server: the same question as `vlm`, many requests in flight.

The server is asked for JSON of a schema. A schema cannot say that times increase, so an answer that is not valid is
asked for again, with another seed and with what was wrong. vLLM also takes the whole grammar (`use_grammar`), with
which every answer is valid. Failures of the server and lost connections are tried again, later and later; where it says
that there are too many requests, all wait. A request that ran out of time is sent once more: each of these may have kept
the server busy for all of that time.
"""

import asyncio
import base64
import os
import queue
import reprlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import tenacity

from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.annotators import Failure
from sarm_lib.annotators.question import Interview, Interviewer, Question, jpeg, stamp
from sarm_lib.artifacts import readable
from sarm_lib.dataset import Episode

TOO_MANY = (429, 503)  # requests: the answers of a rate limit, and of a server that is full
PASSING = (408, 409, 429)  # answers of a server that another try may change; all from 500 on, too
LONGEST_PAUSE = 120.0  # seconds
FIRST_WORD = 30.0  # seconds, in which a server says which models it has
JPEG_BYTES = 0.35 * 4 / 3  # of a pixel, as base64
REFUSALS = (401, 403, 404)  # of whoever asks, whatever is asked
LETTERS = 300  # of an error that are shown
DECODED = 4  # episodes at once, whose raw frames are in memory


@dataclass(kw_only=True)
class ServerAnnotator(Interviewer):
    """Asks the server at `url`, e.g. http://localhost:8000/v1. The key comes from OPENAI_API_KEY, if it needs one."""

    name = "server"
    url: str
    in_flight: int = 16  # requests
    timeout: float = 600.0  # seconds, of one request
    max_retries: int = 8  # of a request that did not come through; waits 0.5, 1, 2, 4, 8, 8... seconds
    max_timeouts: int = 2  # of a request
    use_grammar: bool = False  # vLLM only
    heard: bool = field(default=False, init=False)  # whether a reply was ever one of the API's

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "use_grammar": self.use_grammar}

    def estimate(self, episodes: Sequence[Episode]) -> str:
        """What will be sent, and held here meanwhile; how long it takes is the server's affair."""
        pictures = [len(self.shown(episode)) for episode in episodes]
        height, width = self.picture_size
        size, heads, widest = height * width * JPEG_BYTES / 1e6, len(self.asked), max(pictures, default=0)
        asking, raw = min(self.in_flight, len(episodes)), 3 * height * width / 1e6
        held = widest * (2 * asking * size + min(DECODED, asking) * raw)  # twice: a request's body is a copy
        return (
            f"Estimate for {self.model}: {heads * len(episodes):,} requests or more, {self.in_flight} at once, with "
            f"{heads * sum(pictures):,} pictures in all: about {heads * sum(pictures) * size:,.1f} MB to send, up to "
            f"{widest * size:.1f} MB a request and {held:,.0f} MB of memory; the time depends on the server"
            f"{self.coarse(episodes)}"
        )

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation | Failure]:
        """Yield each episode's result when it is there. Raises AnnotationError where the server is not."""
        # A thread, because a notebook's kernel has an event loop running in its own already.
        results: queue.SimpleQueue[Annotation | Failure | Exception | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        work = loop.create_task(self._annotate(episodes, results))

        def run() -> None:
            try:
                loop.run_until_complete(work)
            except asyncio.CancelledError:
                pass
            except Exception as error:
                results.put(error)
            finally:
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()
                results.put(None)

        thread = threading.Thread(target=run, name="annotate", daemon=True)
        thread.start()
        try:
            while (result := results.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            with suppress(RuntimeError):  # the loop is closed: all is done
                loop.call_soon_threadsafe(work.cancel)
            thread.join()

    async def _annotate(self, episodes: Sequence[Episode], results: queue.SimpleQueue) -> None:
        import openai

        limit = asyncio.Semaphore(self.in_flight)  # of episodes, which ask one request after the other
        decoding = asyncio.Semaphore(DECODED)
        pace = _Pace()
        async with openai.AsyncOpenAI(
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [pace.wait], "response": [pace.hear]}),
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.timeout,
            max_retries=0,  # see `_send`
        ) as client:

            async def one(episode: Episode) -> None:
                async with limit:
                    results.put(await self._episode(client, decoding, episode))

            if self.asked:
                await self._check(client)
            try:
                async with asyncio.TaskGroup() as group:
                    for episode in episodes:
                        group.create_task(one(episode))
            except ExceptionGroup as errors:
                raise self._explain(errors.exceptions[0]) from None

    async def _check(self, client) -> None:
        """Raise AnnotationError where nobody answers within a moment, or not for this model."""
        import openai

        asking = client.with_options(max_retries=1, timeout=min(self.timeout, FIRST_WORD))
        try:
            served = [model.id for model in (await asking.models.list()).data]
        except openai.NotFoundError:  # a server need not have a list
            return
        except openai.OpenAIError as error:
            raise self._explain(error) from None
        except (AttributeError, TypeError, ValueError) as error:  # HTML, or JSON of another kind
            raise self._explain(_NoReply(f"it has no list of models ({error})")) from None
        if self.model not in served:
            raise AnnotationError(f"the server at {self.url} has no model {self.model!r}; it has {', '.join(served)}")

    def _explain(self, error: Exception) -> Exception:
        import openai

        if isinstance(error, openai.APIConnectionError):
            return AnnotationError(
                f"no server answers at {self.url} ({_told(error)}). Start one, for example with `vllm serve {self.model} "
                f"--limit-mm-per-prompt.image {self.max_frames}`, and name it in annotate.server_url. Finished episodes are saved."
            )
        if isinstance(error, openai.OpenAIError | _Trouble):
            return AnnotationError(
                f"the server at {self.url} refuses: {_told(error)} (is OPENAI_API_KEY right, and /v1 in the URL?)"
            )
        if isinstance(error, _NoReply):
            return AnnotationError(
                f"what answers at {self.url} is no OpenAI-compatible server: {error} (is /v1 in the URL?)"
            )
        return error

    async def _episode(self, client, decoding: asyncio.Semaphore, episode: Episode) -> Annotation | Failure:
        """What is wrong with one episode is its Failure; what is wrong with the server is raised."""
        import openai

        refusals = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        held: dict[str, Interview] = {}
        try:
            async with decoding:
                pictures = await asyncio.to_thread(self.pictures, episode) if self.asked else []
            for head in self.asked:
                held[head] = Interview(self.question(episode, head))
                await self._hold(client, held[head], pictures)
            return self.annotation(episode, held)
        except openai.APITimeoutError:
            reason = (
                f"no answer within {self.timeout:g} seconds, {self.max_timeouts} times at most (annotate.server_timeout; or fewer "
                "requests at once: annotate.requests_in_flight)"
            )
        except (openai.APIConnectionError, *refusals):
            raise
        except _NoReply as error:
            if not self.heard:
                raise
            reason = str(error)
        except _Trouble as error:
            if error.code in REFUSALS:
                raise
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {_told(error)}"
        return Failure(episode.index, readable(reason), self.provenance(episode, held))

    async def _hold(self, client, interview: Interview, pictures: list[str]) -> None:
        """Ask until an answer is valid. Raises AnnotationError where none is in `max_attempts` tries."""
        question = interview.question
        for attempt in range(self.max_attempts):
            messages = [{"role": "user", "content": self.content(question, pictures)}]
            if interview.refused:
                last = interview.refused[-1]
                again = f"This answer is not valid: {last['reason']}. Answer again, with JSON only."
                messages += [{"role": "assistant", "content": last["answer"]}, {"role": "user", "content": again}]
            seed = self.try_seed(question, attempt)
            # No max_tokens: vLLM refuses a request whose prompt and max_tokens exceed its context, and schema or grammar bound
            # the answer.
            asking = {"model": self.model, "messages": messages, "seed": seed, **self._format(question)}
            reply = await self._send(client, temperature=self.try_temperature(attempt), **asking)
            choice = reply.choices[0] if reply.choices else None
            said = getattr(choice and choice.message, "content", None)
            text = said if isinstance(said, str) else ""
            interview.hear(text, seed, cut_off=bool(choice) and choice.finish_reason == "length")
            if interview.segments is not None:
                return
        raise AnnotationError(interview.complaint)

    async def _send(self, client, **request):
        """The server's reply. A failure that may pass is waited for; openai's own retries would take a request that ran out
        of time for one. Raises _NoReply where what comes is none of the API's."""
        import openai

        timeouts = 0

        def passing(error: BaseException) -> bool:
            if isinstance(error, _NoReply):  # a gateway's page, say, unless this is no such server at all
                return self.heard
            status = error.code if isinstance(error, _Trouble) else getattr(error, "status_code", 0)
            unknown = isinstance(error, openai.APIConnectionError) or (isinstance(error, _Trouble) and not status)
            return unknown or status in PASSING or status >= 500

        def enough(state: tenacity.RetryCallState) -> bool:
            nonlocal timeouts
            timeouts += isinstance(state.outcome.exception(), openai.APITimeoutError)
            return timeouts >= self.max_timeouts or state.attempt_number > self.max_retries

        waits = tenacity.wait_exponential_jitter(initial=0.5, max=8, jitter=0.5)

        @tenacity.retry(retry=tenacity.retry_if_exception(passing), wait=waits, stop=enough, reraise=True)
        async def sent():
            try:
                reply = await client.chat.completions.create(**request)
            except ValueError as error:
                raise _NoReply(f"its answer is no JSON ({error})") from None
            if not hasattr(reply, "choices"):
                raise _NoReply(f"its answer is {reprlib.repr(reply)}")
            # A gateway's, under the status of success.
            if not reply.choices and (trouble := getattr(reply, "error", None)):
                raise _Trouble(trouble)
            return reply

        reply = await sent()
        self.heard = True
        return reply

    def pictures(self, episode: Episode) -> list[str]:
        """The frames that the model sees, as data URLs: all that stays of an episode in memory, for every head and try."""
        return [f"data:image/jpeg;base64,{base64.b64encode(jpeg(frame)).decode()}" for frame in self.frames(episode)]

    def content(self, question: Question, pictures: list[str]) -> list[dict]:
        """The question as parts of a message: each frame after its time, as Qwen3-VL writes it, then the text."""
        parts = []
        for index, picture in zip(self.shown(question.episode), pictures, strict=True):
            parts.append({"type": "text", "text": stamp(index, question.fps)})
            parts.append({"type": "image_url", "image_url": {"url": picture}})
        return [*parts, {"type": "text", "text": question.prompt}]

    def _format(self, question: Question) -> dict[str, Any]:
        if self.use_grammar:
            return {"extra_body": {"structured_outputs": {"grammar": question.grammar}}}
        schema = {"name": "segments", "strict": True, "schema": question.json_schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}


class _NoReply(Exception):
    """What came is none of the API's objects."""


class _Trouble(Exception):
    """An answer that says that there is none, and why. code: the status that it should have had, 0 where it does not say."""

    def __init__(self, error: Any) -> None:
        super().__init__(f"the server answers with an error: {_short(str(error))}")
        code = error.get("code") if isinstance(error, dict) else None
        self.code = code if isinstance(code, int) else 0


def _told(error: Exception) -> str:
    """An error in the server's own words too, which openai's leave out, or with what lies beneath it."""
    import openai

    text, more = str(error), ""
    if isinstance(error, openai.APIStatusError):
        message = error.body.get("message") if isinstance(error.body, dict) else None
        more = "" if message and str(message) in text else error.response.text.strip()
    elif isinstance(error, openai.APIConnectionError) and error.__cause__:
        more = f"{type(error.__cause__).__name__}: {error.__cause__}"
    return _short(text) if not more or more in text else f"{_short(text)}: {_short(more)}"


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}…"


class _Pace:
    """One pause for all requests: while the server has too many, none is sent, whoever was told so."""

    def __init__(self) -> None:
        self.over = 0.0  # when the pause is over, in the event loop's time
        self.pauses = 0  # since a request came through

    async def wait(self, request) -> None:
        """Before a request is sent."""
        loop = asyncio.get_running_loop()
        while (left := self.over - loop.time()) > 0:
            await asyncio.sleep(left)

    async def hear(self, response) -> None:
        """After each answer. A pause lasts as long as the server asks for, else longer from one to the next."""
        now, asked_for = asyncio.get_running_loop().time(), None
        told = response.status_code >= 500 and {"retry-after", "retry-after-ms"} & set(response.headers)
        if response.status_code not in TOO_MANY and not told:
            self.pauses = 0
            return
        for header, unit in (("retry-after", 1), ("retry-after-ms", 1000)):
            with suppress(KeyError, ValueError):  # it may also be a date
                asked_for = float(response.headers[header]) / unit
        if asked_for is None and now < self.over:  # one of those that were under way when the pause began
            return
        pause = 0.5 * 2 ** min(self.pauses, 8) if asked_for is None else asked_for
        self.over = max(self.over, now + min(pause, LONGEST_PAUSE))
        self.pauses += 1
