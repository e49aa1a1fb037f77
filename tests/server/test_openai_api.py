"""The API as its users see it: OpenAI's own client and plain HTTP, streamed and whole, against the engine itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openai
import pytest
import torch
import transformers
from tests.server.conftest import TINY_GPT, Running

from nanoserve import SamplingParams

HELLO = [{"role": "user", "content": "def main"}]


def events(served: Running, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of every event; the stream ends with [DONE]."""
    with served.client.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# ---- completions


def test_a_completion_is_the_engines(served: Running) -> None:
    made = served.openai().completions.create(model="tiny", prompt="def main", max_tokens=24, temperature=0)
    assert made.object == "text_completion"
    assert made.choices[0].text == text_of(served, "def main", 24)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (8, 24, 32)


def text_of(served: Running, prompt: str, max_tokens: int) -> str:
    """By the oracle: transformers' greedy tokens in float32; tokens are bytes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_GPT, dtype=torch.float32)
    ids = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return bytes(out[0, ids.shape[1] :].tolist()).decode("utf-8", "replace")


@pytest.mark.parametrize("prompt", ["def main", list(b"def main"), ["def", "import"], [[100, 101], [102]]])
def test_prompts_of_every_kind(served: Running, prompt: Any) -> None:
    made = served.complete(prompt=prompt, max_tokens=4, temperature=0, n=2)
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice["index"] for choice in made["choices"]] == list(range(2 * count))
    for at in range(count):
        assert made["choices"][2 * at]["text"] == made["choices"][2 * at + 1]["text"]  # greedy
    assert made["usage"]["completion_tokens"] == 8 * count


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"seed": 7, "temperature": 1.2, "top_p": 0.9},
        {"seed": 7, "temperature": 1.0, "n": 3, "logprobs": 2},
        {"seed": -5, "stop": ["e", "zz"], "temperature": 1.5},
        {"temperature": 0, "echo": True, "logprobs": 0},
        {"temperature": 0, "echo": True, "logprobs": 3, "max_tokens": 0},
        {"seed": 3, "temperature": 1.5, "n": 2, "echo": True, "return_token_ids": True},
    ],
    ids=str,
)
def test_streamed_equals_whole(served: Running, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": ["def ", "été"], "max_tokens": 30, **fields}
    whole = served.complete(**body)
    usage: dict[str, Any] | None = None
    texts, reasons, lists, ids = {}, {}, {}, {}
    for event in events(
        served, "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    ):
        assert "usage" in event
        assert (event["usage"] is None) == bool(event["choices"])
        usage = event["usage"]
        for choice in event["choices"]:
            at = choice["index"]
            texts[at] = texts.get(at, "") + choice["text"]
            reasons[at] = choice["finish_reason"] or reasons.get(at)
            ids[at] = ids.get(at, []) + choice.get("token_ids", [])
            for name, values in (choice["logprobs"] or {}).items():
                lists.setdefault(at, {}).setdefault(name, []).extend(values)
    for choice in whole["choices"]:
        at = choice["index"]
        assert (texts[at], reasons[at]) == (choice["text"], choice["finish_reason"])
        assert lists.get(at) == choice["logprobs"]
        assert ids[at] == choice.get("token_ids", [])
    assert usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == whole["usage"][name]


def test_a_seed_gives_the_same_answer_and_another_a_different_one(served: Running) -> None:
    ask = {"prompt": "def main", "temperature": 1.5, "max_tokens": 30}
    first, again, other = (served.complete(**ask, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2))
    assert first == again != other


def test_stop_strings_and_tokens(served: Running) -> None:
    whole = served.complete(prompt="def main", max_tokens=20, temperature=0)["choices"][0]["text"]
    stop = whole[5:8]
    made = served.complete(prompt="def main", max_tokens=20, temperature=0, stop=stop)["choices"][0]
    assert (made["text"], made["finish_reason"], made["stop_reason"]) == (
        whole[: whole.index(stop)],
        "stop",
        stop,
    )
    made = served.complete(
        prompt="def main", max_tokens=20, temperature=0, stop=[stop], include_stop_str_in_output=True
    )
    assert made["choices"][0]["text"] == whole[: whole.index(stop)] + stop
    token = ord(whole[3])
    made = served.complete(prompt="def main", max_tokens=20, temperature=0, stop_token_ids=[token])[
        "choices"
    ][0]
    assert (made["text"], made["stop_reason"]) == (whole[: whole.index(whole[3])], token)


def test_logprobs_are_transformers(served: Running) -> None:
    prompt = "import os\n"
    made = served.complete(prompt=prompt, max_tokens=8, temperature=0, logprobs=5, echo=True)["choices"][0]
    assert made["text"].startswith(prompt)
    told = made["logprobs"]
    assert "".join(told["tokens"]) == made["text"]
    assert told["text_offset"] == list(range(len(made["text"])))
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_GPT, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([list(made["text"].encode())])).logits[0].double()
    expected = torch.log_softmax(logits, -1)
    for at, byte in enumerate(made["text"].encode()[1:]):
        assert abs(told["token_logprobs"][at + 1] - expected[at, byte].item()) < 1e-3
        top = expected[at].topk(5)
        assert np.allclose(
            sorted(told["top_logprobs"][at + 1].values())[-5:], sorted(top.values.tolist()), atol=1e-3
        )


def test_prompt_logprobs(served: Running) -> None:
    made = served.complete(prompt="abc", max_tokens=1, temperature=0, prompt_logprobs=1)["choices"][0]
    assert made["prompt_logprobs"][0] is None
    assert [
        entry[str(token)]["decoded_token"]
        for entry, token in zip(made["prompt_logprobs"][1:], b"bc", strict=True)
    ] == ["b", "c"]


def test_a_bias_and_bad_words_are_heeded(served: Running) -> None:
    made = served.complete(prompt="a", max_tokens=5, temperature=0, logit_bias={"120": 100})
    assert made["choices"][0]["text"] == "xxxxx"
    text = served.complete(prompt="def main", max_tokens=20, temperature=0)["choices"][0]["text"]
    made = served.complete(prompt="def main", max_tokens=20, temperature=0, bad_words=[text[0]])
    assert text[0] not in made["choices"][0]["text"]


# ---- chat


def test_a_chat_is_what_the_template_makes_of_it(served: Running) -> None:
    made = served.openai().chat.completions.create(model="tiny", messages=HELLO, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    prompt = "<|im_start|>user\ndef main<|im_end|>\n<|im_start|>assistant\n"
    assert (
        made.choices[0].message.content
        == served.complete(prompt=prompt, max_tokens=16, temperature=0)["choices"][0]["text"]
    )
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"seed": 11, "n": 3, "temperature": 1.3},
        {"seed": 11, "logprobs": True, "top_logprobs": 2, "temperature": 1.3},
        {"seed": 2, "max_completion_tokens": 9, "stop": "e"},
        {
            "temperature": 0,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        },
    ],
    ids=lambda fields: ",".join(fields),
)
def test_a_streamed_chat_equals_a_whole_one(served: Running, fields: dict[str, Any]) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        **({} if "max_completion_tokens" in fields else {"max_tokens": 40}),
        **fields,
    }
    client = served.openai()
    whole = client.chat.completions.create(**body)
    texts, reasons, logprobs, roles = {}, {}, {}, {}
    usage = None
    for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            at = choice.index
            roles.setdefault(at, choice.delta.role)
            texts[at] = texts.get(at, "") + (choice.delta.content or "")
            reasons[at] = choice.finish_reason or reasons.get(at)
            if choice.logprobs is not None:
                logprobs.setdefault(at, []).extend(choice.logprobs.content or [])
    for choice in whole.choices:
        at = choice.index
        assert (texts[at], reasons[at], roles[at]) == (
            choice.message.content,
            choice.finish_reason,
            "assistant",
        )
        assert logprobs.get(at) == (choice.logprobs.content if choice.logprobs else None)
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_unicode_survives_the_stream(served: Running) -> None:
    """Bytes at random make every kind of broken and whole character; what is streamed is what is said."""
    for seed in range(20):
        body = {"model": "tiny", "prompt": "é日本🎉", "max_tokens": 40, "temperature": 3.0, "seed": seed}
        whole = served.complete(**body)["choices"][0]["text"]
        parts = [
            event["choices"][0]["text"]
            for event in events(served, "/v1/completions", {**body, "stream": True})
        ]
        assert "".join(parts) == whole


def test_tool_calls_come_as_such(served: Running) -> None:
    """The model says what a bias and stop make it say: that is not much, so the parser gets it from the prompt's echo."""
    tools = [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    ]
    made = served.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": HELLO, "tools": tools, "max_tokens": 4, "temperature": 0},
    )
    assert made.status_code == 200
    assert (
        made.json()["usage"]["prompt_tokens"]
        > len("<|im_start|>user\ndef main<|im_end|>\n<|im_start|>assistant\n") + 20
    )  # tools were shown
    history = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    made = served.post(
        "/v1/chat/completions", {"model": "tiny", "messages": history, "max_tokens": 4, "temperature": 0}
    )
    assert made.status_code == 200, made.text


# ---- other routes


def test_models_and_tokens(served: Running) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    made = served.post("/tokenize", {"prompt": "dé", "return_token_strs": True}).json()
    assert made["tokens"] == list("dé".encode())
    assert made["count"] == 3
    assert served.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": "dé"}
    messages = served.post("/tokenize", {"messages": HELLO}).json()
    assert bytes(messages["tokens"]).decode().endswith("<|im_start|>assistant\n")


def test_ignored_parameters_are_named(served: Running) -> None:
    answer = served.post(
        "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1, "foo": 1, "bar": 2}
    )
    assert answer.headers["x-nanoserve-ignored"] == "bar, foo"
    odd = {"é\r\nSet-Cookie: x": 1, "日" * 100: 1, **{f"p{i:02}": 1 for i in range(40)}}
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1, **odd})
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-nanoserve-ignored"].endswith(", and 10 more")
    answer = served.post("/tokenize", {"prompt": "a", "é\n": 1})
    assert answer.headers["x-nanoserve-ignored"] == "%C3%A9%0A"


# ---- errors


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"model": "other", "prompt": "a"}, 404, "model"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/completions", {"model": "tiny", "prompt": "a" * 2000}, 400, "prompt"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 5000}, 400, "max_tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": [300]}, 400, "prompt"),
        ("/v1/completions", {"model": "tiny", "prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "stream_options": {}}, 400, "stream_options"),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": "a", "min_tokens": 9, "max_tokens": 3},
            400,
            "min_tokens",
        ),
        ("/v1/completions", {"model": "tiny", "prompt": ["a"] * 65}, 400, "prompt"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": 1}]}, 400, "messages[0].role"),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": HELLO, "top_logprobs": 1},
            400,
            "top_logprobs",
        ),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": HELLO, "tool_choice": "required"},
            400,
            "tool_choice",
        ),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": HELLO, "chat_template_kwargs": {"messages": 1}},
            400,
            None,
        ),
        ("/tokenize", {}, 400, "prompt"),
        ("/detokenize", {"tokens": [999]}, 400, None),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_its_name(
    served: Running, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = served.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    if param is not None:
        assert error["param"] == param
    assert error["request_id"] == answer.headers["x-request-id"]


def test_the_client_raises_its_own_errors(served: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature: -1"):
        served.openai().completions.create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        served.openai().completions.create(model="gpt", prompt="a")


def test_wrong_routes_and_methods(served: Running) -> None:
    assert served.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert served.client.get("/v1/completions").status_code == 405
    assert (
        served.client.post(
            "/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}
        ).status_code
        == 415
    )


def test_params_reach_the_engine_unchanged(served: Running) -> None:
    """One request with everything; the engine's own answer to the same parameters."""
    fields = {
        "temperature": 1.1, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "seed": 5, "presence_penalty": 0.3, "min_tokens": 3,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"101": -3}, "ignore_eos": True, "max_tokens": 25,
    }  # fmt: skip
    made = served.complete(prompt="class A", return_token_ids=True, **fields)["choices"][0]
    params = SamplingParams(**{**fields, "logit_bias": {101: -3}})
    served.wait_until_idle()
    (request,) = served.engine.generate([list(b"class A")], params)
    assert made["token_ids"] == request.output_tokens


def test_what_clients_send_by_default_passes(served: Running) -> None:
    made = served.post(
        "/v1/chat/completions",
        {
            "model": "tiny", "messages": HELLO, "max_completion_tokens": 2, "stream": False, "n": 1, "temperature": 1, "top_p": 1,
            "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "stop": None, "logprobs": False, "user": "me", "tools": [],
            "parallel_tool_calls": True, "store": False, "metadata": {"trace": "1"}, "prompt_cache_key": "k", "service_tier": "auto",
            "response_format": {"type": "text"}, "stream_options": None, "seed": None, "modalities": ["text"], "tool_choice": "none",
        },
    )  # fmt: skip
    assert made.status_code == 200, made.text
    assert made.headers["x-nanoserve-ignored"] == "metadata, prompt_cache_key"


def test_what_frameworks_add_to_tools_passes(served: Running) -> None:
    """As LangChain's with_structured_output sends it."""
    schema = {
        "type": "object",
        "properties": {"x": {"const": 1}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "P", "description": "", "parameters": schema}}
    made = served.post(
        "/v1/chat/completions",
        {
            "model": "tiny", "messages": HELLO, "tools": [tool], "tool_choice": {"type": "function", "function": {"name": "P"}},
            "parallel_tool_calls": False, "max_completion_tokens": 300, "stream": False, "temperature": 0,
            "logit_bias": {"32": -100, "10": -100},
        },
    )  # fmt: skip
    assert made.status_code == 200, made.text
    (call,) = made.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "P", "arguments": '{"x": 1}'}
    assert made.json()["choices"][0]["finish_reason"] == "tool_calls"


def test_a_calls_sequences_and_log_probabilities_are_bounded(served: Running) -> None:
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": ["a"] * 32, "n": 16, "max_tokens": 1})
    assert answer.status_code == 400
    assert "512 sequences, at most 256" in answer.json()["error"]["message"]
    body = {"model": "tiny", "prompt": ["a"] * 16, "n": 16, "max_tokens": 500, "logprobs": 20}
    answer = served.post("/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
    assert "2688000 values, at most 2097152" in answer.json()["error"]["message"]
