"""Client of an OpenAI-compatible server: single questions, or many in order with bounded concurrency."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .config import JudgeConfig
from .endpoint import Endpoint, Reply
from .errors import AnswerError, JudgeError, one_line
from .question import Answer, Question, TokenChoice

T = TypeVar("T")
R = TypeVar("R")
TOP_LOGPROBS = 20
PATH = "/chat/completions"


@dataclass(frozen=True)
class Abilities:
    """Abilities of a server: token log-probabilities, and the supported type of ``response_format``."""

    logprobs: bool = False
    response_format: str = "none"


class Asker(Protocol):
    """Server, or a recording of one."""

    config: JudgeConfig

    @property
    def abilities(self) -> Abilities: ...

    def ask(self, question: Question, seed: int | None = None) -> Answer:
        """Raises AnswerError for a failure of this question, JudgeError if further questions would fail too."""


class Client:
    """Judge at ``config.base_url``; thread-safe; probes the server before the first question."""

    def __init__(
        self, config: JudgeConfig, *, abilities: Abilities | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.config = config
        self.endpoint = Endpoint(config, sleep=sleep)
        self._abilities = abilities
        self._lock = threading.Lock()

    @property
    def abilities(self) -> Abilities:
        """Abilities of the server, probed once with short questions without pictures. Raises JudgeError."""
        with self._lock:
            if self._abilities is None:
                self._abilities = self._probe()
            return self._abilities

    def ask(self, question: Question, seed: int | None = None) -> Answer:
        """Ask one question; ``seed`` defaults to the judge's. Errors: see ``Asker.ask``."""
        config = self.config
        if len(question.pictures) > config.max_images:
            raise AnswerError(
                "rejected",
                f"expected at most {config.max_images} pictures (judge.max_images), got {len(question.pictures)}",
            )
        seed = config.seed if seed is None else seed
        key = question.key(config.model, config.temperature, seed)
        reply = self.endpoint.post_json(PATH, request_body(question, config, seed, self.abilities))
        return read_reply(reply, key, self.endpoint.hide_key)

    def _probe(self) -> Abilities:
        config = self.config
        logprobs = config.logprobs == "auto" and self._supports_logprobs()
        if config.response_format != "auto":
            return Abilities(logprobs, config.response_format)
        formats = ("json_schema", "json_object")
        return Abilities(logprobs, next((name for name in formats if self._supports_format(name)), "none"))

    def _supports_logprobs(self) -> bool:
        question = Question(("Answer with the digit 7 and nothing else.",), first_tokens=True, max_tokens=16)
        answer = self._attempt(question, Abilities(logprobs=True))
        return answer is not None and any(choice.alternatives for choice in answer.tokens)

    def _supports_format(self, response_format: str) -> bool:
        schema = object_schema({"answer": {"type": "integer"}})
        question = Question(('Answer with the number seven, as JSON: {"answer": 7}',), schema, max_tokens=64)
        answer = self._attempt(question, Abilities(response_format=response_format))
        if answer is None:
            return False
        try:
            return isinstance(json.loads(answer.text), dict)
        except ValueError:
            return False

    def _attempt(self, question: Question, abilities: Abilities) -> Answer | None:
        """Ask a probe question; None if the server rejects it or cuts the answer."""
        try:
            reply = self.endpoint.post_json(PATH, request_body(question, self.config, self.config.seed, abilities))
            return read_reply(reply, "", self.endpoint.hide_key)
        except AnswerError:
            return None


def object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def request_body(question: Question, config: JudgeConfig, seed: int, abilities: Abilities) -> dict[str, Any]:
    """JSON body of one chat completion."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": question.content}],
        "temperature": config.temperature,
        "seed": seed,
        "max_tokens": question.max_tokens or config.max_tokens,
        **config.extra,
    }
    if question.first_tokens and abilities.logprobs:
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if question.schema is not None and abilities.response_format == "json_schema":
        json_schema = {"name": "answer", "strict": True, "schema": dict(question.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    elif question.schema is not None and abilities.response_format == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def read_reply(reply: Reply, key: str, hide: Callable[[str], str] = str) -> Answer:
    """Check a chat completion. Raises JudgeError for another protocol, AnswerError for an incomplete answer."""
    data = reply.data
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise JudgeError(
            f"expected choices[0].message in the server's answer, got {hide(one_line(data, 100))}; it has no chat API"
        ) from None
    if choice.get("finish_reason") == "length":
        raise AnswerError("cut", "the answer was cut at max_tokens; increase judge.max_tokens")
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise AnswerError("refused", f"the judge declined: {hide(one_line(message.get('refusal') or 'filtered'))}")
    if not isinstance(text, str) or not text.strip():
        raise AnswerError("unparsed", "the answer is empty")
    model = data.get("model")
    return Answer(
        hide(text), key, model if isinstance(model, str) else "", round(reply.seconds, 3), reply.tries, _tokens(choice)
    )


def _tokens(choice: dict[str, Any]) -> tuple[TokenChoice, ...]:
    """Log-probabilities of the generated tokens; empty if missing or malformed."""
    try:
        return tuple(
            TokenChoice(
                str(one["token"]),
                {str(other["token"]): float(other["logprob"]) for other in one.get("top_logprobs") or []},
            )
            for one in choice["logprobs"]["content"]
        )
    except (KeyError, TypeError, ValueError):
        return ()


def in_order(function: Callable[[T], R], items: Iterable[T], concurrency: int) -> Iterator[R]:
    """Yield results in the order of the items, at most ``concurrency`` at once; the first item runs alone.

    It runs alone because a server may load its model for minutes at the first request. An exception, Ctrl-C included,
    ends the iteration after the calls in flight; no further call starts.
    """
    items = iter(items)
    stop = threading.Event()

    def call(item: T) -> R:
        if stop.is_set():
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            stop.set()  # here, since the caller sees the exception later than the pool takes its next item
            raise

    for first in items:
        yield function(first)
        break
    pool = ThreadPoolExecutor(concurrency)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= 2 * concurrency:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
