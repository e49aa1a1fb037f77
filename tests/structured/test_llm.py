"""Structured outputs through LLM, with random weights at temperature 1: whatever the model likes, the form is kept."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nanoserve.llm import LLM
from nanoserve.sampling import SamplingParams
from nanoserve.structured import StructuredOutputs
from support.families import CASES
from support.oracle import random_model
from support.random_schemas import random_schema
from support.text_checkpoint import make_text_checkpoint

NUM_SCHEMAS = {"llama3": 600, "llama2": 200, "bytes": 200}
CHOICES = ["yes", "yes please", "né", "你好", "👋🌍"]


@pytest.fixture(scope="module", params=list(NUM_SCHEMAS))
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        config = CASES["llama"].config(vocab_size=256, eos_token_id=0, max_position_embeddings=2048)
        random_model(config, "bytes").save_pretrained(directory)
    else:
        make_text_checkpoint(directory, request.param, positions=2048)
    return LLM(directory, kv_cache_bytes=2**24)


def params(seed: int = 0, max_tokens: int = 1500, **fields: Any) -> SamplingParams:
    return SamplingParams(
        temperature=1.0,
        seed=seed,
        max_tokens=max_tokens,
        structured_outputs=StructuredOutputs(**fields),
    )  # type: ignore[arg-type]


def test_random_schemas_are_obeyed(llm: LLM, request: pytest.FixtureRequest) -> None:
    """Every output ends by itself, is JSON, and obeys its schema, says another library."""
    count = NUM_SCHEMAS[request.node.callspec.params["llm"]]
    schemas = [random_schema(random.Random(seed)) for seed in range(count)]
    outputs = llm.generate(["x"] * count, [params(i, json=schema) for i, schema in enumerate(schemas)])
    kinds = set()
    for schema, output in zip(schemas, outputs, strict=True):
        assert (output.finish_reason, output.error) == ("stop", None), (schema, output.text)
        value = json.loads(str(output.text))
        jsonschema.validate(value, schema)
        kinds.add(type(value))
    assert kinds == {dict, list, int, float, str, bool, type(None)}
    llm.engine.audit()


def test_any_object_choice_and_regex(llm: LLM) -> None:
    regex = r"[A-Z][a-zé]{0,5}( [0-9]{1,3})?!"
    wanted = [params(i, json_object=True) for i in range(10)]
    wanted += [params(i, choice=CHOICES) for i in range(40)]
    wanted += [params(i, regex=regex) for i in range(40)]
    outputs = llm.generate(["x"] * len(wanted), wanted)
    texts = [str(output.text) for output in outputs]
    for output, text in zip(outputs[:10], texts, strict=False):
        if output.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
    assert any(output.finish_reason == "stop" for output in outputs[:10])
    assert all(output.finish_reason == "stop" for output in outputs[10:])
    assert set(texts[10:50]) <= set(CHOICES)
    assert len(set(texts[10:50])) > 1
    assert all(re.fullmatch(regex, text) for text in texts[50:])


def test_mates_keep_their_bits_and_an_answer_does_not_depend_on_them(llm: LLM) -> None:
    free = [SamplingParams(temperature=1.0, seed=i, max_tokens=30, logprobs=3) for i in range(4)]
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 6}
    bound = params(7, json=schema, max_tokens=200)
    alone = [llm.generate("hello", one)[0] for one in [*free, bound]]
    together = llm.generate(["hello"] * 5, [*free, bound])
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs


def test_each_of_n_sequences_has_its_own_place_in_the_grammar(llm: LLM) -> None:
    one = params(3, choice=CHOICES)
    (output,) = llm.generate(
        "x", SamplingParams(temperature=1.0, seed=3, n=12, structured_outputs=one.structured_outputs)
    )
    texts = {completion.text for completion in output.outputs}
    assert texts <= set(CHOICES)
    assert len(texts) > 1


def test_a_stream_is_the_same_text(llm: LLM) -> None:
    one = params(5, json={"type": "array", "items": {"enum": CHOICES}, "maxItems": 4})
    deltas = list(llm.stream("x", one))
    assert "".join(delta.text for delta in deltas) == llm.generate("x", one)[0].text
    assert deltas[-1].finish_reason == "stop"


def test_stop_strings_and_max_tokens_may_cut_it(llm: LLM) -> None:
    spec = StructuredOutputs(regex="(ab ){40}end")
    cut = llm.generate("x", SamplingParams(max_tokens=9, structured_outputs=spec))[0]
    assert cut.finish_reason == "length"
    assert ("ab " * 40).startswith(str(cut.text))
    stopped = llm.generate("x", SamplingParams(max_tokens=400, stop=["b a"], structured_outputs=spec))[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", "a")


def test_a_bad_schema_is_refused_before_anything_runs(llm: LLM) -> None:
    good, bad = params(0, choice=["a"]), params(0, json={"type": "string", "format": "postcode"})
    with pytest.raises(ValueError, match=r"prompts\[1\]: structured_outputs.json: Unknown format: postcode"):
        llm.generate(["x", "y"], [good, bad])
    assert not llm.engine.has_unfinished


def test_chat_and_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    directory = make_text_checkpoint(tmp_path / "model", "qwen2")
    chatting = LLM(directory, kv_cache_bytes=2**22)
    (output,) = chatting.chat([{"role": "user", "content": "hello"}], params(1, choice=CHOICES))
    assert output.text in CHOICES
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    bare = LLM(directory, kv_cache_bytes=2**22)
    with pytest.raises(ValueError, match="structured_outputs: this checkpoint has no tokenizer"):
        bare.generate([[1, 2]], params(1, choice=CHOICES))
