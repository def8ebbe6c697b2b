"""Servers that speak OpenAI's interface, kept busy: bounded concurrency, time limits, retries with growing waits.

Stage: questions -> answers. vLLM, SGLang, TGI and `transformers serve` are such servers; several share the work, each
at its own speed. What goes wrong is named and counted; an answer that is not whole is none.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from ..data.pictures import UnreadablePictureError
from ..json_files import parse_json
from .questions import Answer, Fail, Keep, Question, Sampling, TeacherError, data_address, sent_picture

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0
"""Seconds between two tries at most, where the server does not ask for more."""

LONGEST_ASKED_WAIT = 600.0
"""Seconds that a server's `Retry-After` may ask for."""

_FEEDERS = 4  # Pictures that are scaled and encoded at a time.
_FATAL = (401, 403, 404)
_REFUSED = (400, 413, 415, 422)


class _Trouble(Exception):
    """Why a request got no answer: a kind that is counted, and how long the server asks to wait."""

    def __init__(self, kind: str, *, wait: float = 0.0, is_final: bool = False):
        super().__init__(kind)
        self.kind, self.wait, self.is_final = kind, wait, is_final


@dataclass
class _Endpoint:
    """One server."""

    url: str
    takes_schemas: bool
    failures: int = 0
    is_lost: bool = False


@dataclass
class _Waiting:
    """A question with its request; made once, sent until it is answered."""

    question: Question
    body: dict[str, Any]
    schema: dict[str, Any] | None
    tries: int = 0


@dataclass
class Endpoints:
    """Servers with the same model.

    Args:
        urls (`list[str]`): With or without `/v1` at the end.
        model (`str`): What they call it.
        sampling ([`Sampling`]): Of the answers.
        max_new_tokens (`int`, *optional*): In place of the prompts' own.
        image_side (`int`): Pixels of a picture's longer side at most.
        structured_output (`bool`): Sends the JSON schema of an answer; a server that refuses it is asked without.
        concurrency (`int`): Requests in flight at each server.
        timeout (`float`): Seconds that a request may take.
        tries (`int`): Of each question.
        first_wait (`float`): Seconds before the second try; each further one waits twice as long.
        api_key (`str`, *optional*): Sent as bearer token.
    """

    urls: list[str]
    model: str
    sampling: Sampling
    max_new_tokens: int | None = None
    image_side: int = 1024
    structured_output: bool = True
    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 8
    first_wait: float = 1.0
    api_key: str | None = None
    troubles: Counter[str] = field(default_factory=Counter)
    """What went wrong -> how often, retried requests included."""

    def ask(self, questions: Iterator[Question], keep: Keep, fail: Fail) -> None:
        """Asks all questions; answers are given to `keep` as they come.

        Raises:
            TeacherError: When no server is left that answers, or one does not know the model or the key; answers that
                came until then are kept.
            KeyboardInterrupt: After Ctrl-C; likewise.
        """
        asyncio.run(self._ask(questions, keep, fail))

    async def _ask(self, questions: Iterator[Question], keep: Keep, fail: Fail) -> None:
        self._endpoints = [_Endpoint(_address(url), self.structured_output) for url in self.urls]
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._places = asyncio.Semaphore(2 * self.concurrency * len(self._endpoints))
        self._keep, self._fail = keep, fail
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        # What the environment says of proxies is for the world outside, and a local server is not there.
        async with httpx2.AsyncClient(headers=headers, timeout=self.timeout, limits=limits, trust_env=False) as client:
            guard = asyncio.Lock()
            feeders = [asyncio.create_task(self._feed(questions, guard)) for _ in range(_FEEDERS)]
            workers = [
                asyncio.create_task(self._work(client, endpoint))
                for endpoint in self._endpoints
                for _ in range(self.concurrency)
            ]
            done = asyncio.create_task(self._finish(feeders))
            try:
                waiting: set[asyncio.Task] = {done, *workers}
                while not done.done():
                    finished, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in finished:
                        task.result()
                    if not waiting - {done} and not done.done():
                        raise TeacherError(self._lost())
            finally:
                for task in (*feeders, *workers, done):
                    task.cancel()
                await asyncio.gather(*feeders, *workers, done, return_exceptions=True)

    def _lost(self) -> str:
        named = ", ".join(f"{kind} ({count:,} times)" for kind, count in self.troubles.most_common(4))
        return f"No server answers any more ({', '.join(self.urls)}): {named}."

    async def _finish(self, feeders: list[asyncio.Task]) -> None:
        await asyncio.gather(*feeders)
        await self._queue.join()

    async def _feed(self, questions: Iterator[Question], guard: asyncio.Lock) -> None:
        """Keeps some requests ready, so that no server waits for a picture to be scaled."""
        while True:
            await self._places.acquire()
            async with guard:
                question = await asyncio.to_thread(next, questions, None)
            if question is None:
                self._places.release()
                return
            try:
                body = await asyncio.to_thread(self._body, question)
            except UnreadablePictureError as error:
                self._fail(question, str(error))
                self._places.release()
                continue
            self._queue.put_nowait(_Waiting(question, body, question.prompt.shape.schema))

    def _body(self, question: Question) -> dict[str, Any]:
        picture = sent_picture(question.stored, self.image_side, question.prompt.whole_cells)
        parts = [
            {"type": "image_url", "image_url": {"url": data_address(picture)}},
            {"type": "text", "text": question.prompt.text},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "temperature": self.sampling.temperature,
            "max_tokens": self.max_new_tokens or question.prompt.max_new_tokens,
            "seed": self.sampling.seed_of(question.picture, question.sample),
        }
        return body if self.sampling.top_p is None else body | {"top_p": self.sampling.top_p}

    async def _work(self, client: httpx2.AsyncClient, endpoint: _Endpoint) -> None:
        """One request after the other at one server, until it is given up."""
        failures = 0
        while not endpoint.is_lost:
            waiting = await self._queue.get()
            try:
                answer = await self._request(client, endpoint, waiting)
            except _Trouble as trouble:
                self.troubles[trouble.kind] += 1
                waiting.tries += 1
                if trouble.is_final or waiting.tries >= self.tries:
                    self._fail(waiting.question, trouble.kind)
                    self._places.release()
                else:
                    # Behind the others: whichever server is free takes it.
                    self._queue.put_nowait(waiting)
                self._queue.task_done()
                failures += 1
                endpoint.failures += 1
                if endpoint.failures >= self.tries * self.concurrency:
                    if not endpoint.is_lost:
                        logger.warning("%s is given up: %s.", endpoint.url, trouble.kind)
                    endpoint.is_lost = True
                elif not trouble.is_final:
                    grown = self.first_wait * 2 ** min(failures - 1, 20)
                    # Not all at the same moment.
                    await asyncio.sleep(max(trouble.wait, min(grown, LONGEST_WAIT) * random.uniform(0.5, 1.0)))
                continue
            failures = endpoint.failures = 0
            self._keep(waiting.question, answer)
            self._places.release()
            self._queue.task_done()

    async def _request(self, client: httpx2.AsyncClient, endpoint: _Endpoint, waiting: _Waiting) -> Answer:
        """One try.

        Raises:
            _Trouble: When there is no whole answer.
            TeacherError: When the server will never give one.
        """
        schema = waiting.schema if endpoint.takes_schemas else None
        body = waiting.body
        if schema is not None:
            named = {"name": waiting.question.prompt.task, "schema": schema, "strict": True}
            body = body | {"response_format": {"type": "json_schema", "json_schema": named}}
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                response = await client.post(f"{endpoint.url}/chat/completions", json=body)
        except (TimeoutError, httpx2.TimeoutException):
            raise _Trouble(f"no answer in {self.timeout:g} s") from None
        except httpx2.ConnectError:
            raise _Trouble("connection refused") from None
        except httpx2.HTTPError:
            raise _Trouble("connection broke off") from None
        seconds = time.monotonic() - started
        status = response.status_code
        if status in _REFUSED and schema is not None:
            logger.info("%s refuses JSON schemas (%d); its answers are parsed as they come.", endpoint.url, status)
            endpoint.takes_schemas = False
            return await self._request(client, endpoint, waiting)
        if status in _FATAL:
            raise TeacherError(f"{endpoint.url} answers {status} for the model {self.model!r}: {_said(response)}")
        if status in _REFUSED:
            raise _Trouble(f"status {status}: {_said(response)}", is_final=True)
        if status != 200:
            raise _Trouble(f"status {status}", wait=_asked_wait(response))
        return _read(response, seconds)


def _address(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _said(response: httpx2.Response) -> str:
    """A server's own words, on one line."""
    return " ".join(response.text.split())[:200] or "no reason given"


def _asked_wait(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait; a date instead of seconds is not read."""
    try:
        return min(max(float(response.headers.get("Retry-After", 0)), 0.0), LONGEST_ASKED_WAIT)
    except ValueError:
        return 0.0


def _read(response: httpx2.Response, seconds: float) -> Answer:
    try:
        found = parse_json(response.content)
    except ValueError:
        raise _Trouble("an answer that is no JSON") from None
    try:
        choice = found["choices"][0]
        text = choice["message"].get("content")
        usage = found.get("usage") or {}
        read, written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        finish = str(choice.get("finish_reason") or "stop")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise _Trouble("an answer of another shape") from None
    if text is not None and not isinstance(text, str):
        raise _Trouble("an answer of another shape")
    return Answer(text or "", finish, read, written, seconds)
