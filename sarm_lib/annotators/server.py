"""Annotations from any OpenAI-compatible server: the same question as `vlm`, many requests in flight.

The server is asked for JSON of a schema. A schema cannot say that times increase, so an answer that is not valid is
asked for again, with another seed and with what was wrong. vLLM also takes the whole grammar (`use_grammar`), with
which every answer is valid. Rate limits, failures of the server and lost connections are tried again, later and later.
"""

import asyncio
import base64
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.annotators import Failure
from sarm_lib.annotators.question import Answer, Interviewer, Question, jpeg
from sarm_lib.dataset import Episode


@dataclass(kw_only=True)
class ServerAnnotator(Interviewer):
    """Asks the server at `url`, e.g. http://localhost:8000/v1. The key comes from OPENAI_API_KEY, if it needs one."""

    name = "server"
    url: str
    in_flight: int = 16  # requests
    timeout: float = 600.0  # seconds, of one request
    max_retries: int = 8  # of a request that did not come through; waits 0.5, 1, 2, 4, 8, 8... seconds
    use_grammar: bool = False  # vLLM only

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "use_grammar": self.use_grammar}

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
        async with openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.timeout,
            max_retries=self.max_retries,
        ) as client:

            async def one(episode: Episode) -> None:
                async with limit:
                    results.put(await self._episode(client, episode))

            if self.asked:
                await self._check(client)
            try:
                async with asyncio.TaskGroup() as group:
                    for episode in episodes:
                        group.create_task(one(episode))
            except ExceptionGroup as errors:
                raise self._explain(errors.exceptions[0]) from None

    async def _check(self, client) -> None:
        """Raise AnnotationError where nobody answers, or not for this model."""
        import openai

        try:
            served = [model.id for model in (await client.with_options(max_retries=1).models.list()).data]
        except openai.NotFoundError:  # a server need not have a list
            return
        except openai.OpenAIError as error:
            raise self._explain(error) from None
        if self.model not in served:
            raise AnnotationError(f"the server at {self.url} has no model {self.model!r}; it has {', '.join(served)}")

    def _explain(self, error: Exception) -> Exception:
        import openai

        if isinstance(error, openai.APIConnectionError):
            return AnnotationError(
                f"no server answers at {self.url} ({error}). Start one, for example with `vllm serve {self.model} "
                f"--limit-mm-per-prompt.image {self.max_frames}`, and name it in annotate.server_url. Finished episodes are saved."
            )
        if isinstance(error, openai.OpenAIError):
            return AnnotationError(
                f"the server at {self.url} refuses: {error} (is OPENAI_API_KEY right, and /v1 in the URL?)"
            )
        return error

    async def _episode(self, client, episode: Episode) -> Annotation | Failure:
        """What is wrong with one episode is its Failure; what is wrong with the server is raised."""
        import openai

        refusals = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        try:
            frames = await asyncio.to_thread(self.frames, episode) if self.asked else np.empty(0)
            answers = {head: await self._ask(client, self.question(episode, head), frames) for head in self.asked}
            return self.annotation(episode, answers)
        except openai.APITimeoutError:
            return Failure(episode.index, f"no answer within {self.timeout:g} seconds")
        except (openai.APIConnectionError, *refusals):
            raise
        except Exception as error:
            return Failure(episode.index, f"{type(error).__name__}: {error}")

    async def _ask(self, client, question: Question, frames: np.ndarray) -> Answer:
        """The first valid answer. Raises AnnotationError where there is none in `max_attempts` tries."""
        refused: tuple[str, ...] = ()
        text = ""
        for attempt in range(self.max_attempts):
            messages = [{"role": "user", "content": await asyncio.to_thread(self.content, question, frames)}]
            if refused:
                again = f"This answer is not valid: {refused[-1]}. Answer again, with JSON only."
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": again}]
            seed = self.try_seed(question, attempt)
            reply = await client.chat.completions.create(
                model=self.model,
                messages=messages,
                seed=seed,
                temperature=self.try_temperature(attempt),
                **self._format(question),
            )
            choice = reply.choices[0] if reply.choices else None
            text = (choice and choice.message.content) or ""
            try:
                if choice and choice.finish_reason == "length":
                    raise AnnotationError("the answer was cut off: it is too long for the server")
                return Answer(question.parse(text), text, seed, refused)
            except AnnotationError as error:
                refused += (str(error),)
        raise AnnotationError(f"{question.head}: no valid answer in {self.max_attempts} tries; the last: {refused[-1]}")

    def content(self, question: Question, frames: np.ndarray) -> list[dict]:
        """The question as parts of a message: each frame after its time, as Qwen3-VL writes it, then the text."""
        parts = []
        for index, frame in zip(self.shown(question.episode), frames):
            picture = f"data:image/jpeg;base64,{base64.b64encode(jpeg(frame)).decode()}"
            parts.append({"type": "text", "text": f"<{index / question.fps:.1f} seconds>"})
            parts.append({"type": "image_url", "image_url": {"url": picture}})
        return [*parts, {"type": "text", "text": question.prompt}]

    def _format(self, question: Question) -> dict[str, Any]:
        if self.use_grammar:
            return {"extra_body": {"structured_outputs": {"grammar": question.grammar}}}
        schema = {"name": "segments", "strict": True, "schema": question.json_schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
