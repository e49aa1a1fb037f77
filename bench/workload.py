"""The realistic prefix workload: system prompts, few-shot blocks and multi-turn conversations (workloads/assistant.json)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanoserve import NanoServingEngine, Request, SamplingParams

FILE = Path(__file__).parent / "workloads" / "assistant.json"


@dataclass
class Conversation:
    """Token history of one dialogue and the messages still to be sent."""

    history: list[int]
    messages: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)


def read_description() -> dict[str, Any]:
    description: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return description


def conversations(description: dict[str, Any], vocab_size: int) -> list[Conversation]:
    """The dialogues the description asks for: the same ones every time."""
    rng = np.random.default_rng(description["seed"])

    def tokens(bounds: list[int]) -> list[int]:
        drawn: list[int] = rng.integers(1, vocab_size, int(rng.integers(bounds[0], bounds[1] + 1))).tolist()
        return drawn

    systems = [tokens(description["system_prompt_tokens"]) for _ in range(description["assistants"])]
    shots = [tokens(description["few_shot_tokens"]) for _ in range(description["assistants"])]
    made = []
    for _ in range(description["conversations"]):
        which = int(rng.choice(len(systems), p=description["popularity"]))
        history = list(systems[which])
        if rng.random() < description["few_shot_probability"]:
            history += shots[which]
        turns = int(rng.integers(description["turns"][0], description["turns"][1] + 1))
        made.append(Conversation(history, [tokens(description["message_tokens"]) for _ in range(turns)]))
    return made


def serve(engine: NanoServingEngine, description: dict[str, Any]) -> list[Conversation]:
    """Play all conversations through an engine, `concurrent` at a time; returns them with their answers."""
    params = SamplingParams(temperature=0.0, max_tokens=description["answer_tokens"], ignore_eos=True)
    played = conversations(description, engine.config.vocab_size)
    queue: Iterator[Conversation] = iter(played)
    open_turns: dict[Any, Conversation] = {}

    def send(conversation: Conversation) -> None:
        conversation.history += conversation.messages.pop(0)
        open_turns[engine.add_request(conversation.history, params).req_id] = conversation

    for conversation, _ in zip(queue, range(description["concurrent"]), strict=False):
        send(conversation)
    while open_turns:
        for request in engine.step().finished:
            _answered(request, open_turns.pop(request.req_id), send, queue)
    return played


def _answered(request: Request, conversation: Conversation, send: Any, queue: Iterator[Conversation]) -> None:
    conversation.answers.append(list(request.output_tokens))
    conversation.history += request.output_tokens
    if conversation.messages:
        send(conversation)
    else:
        following = next(queue, None)
        if following is not None:
            send(following)
