"""What a request may say: one table, which checks it and which /v1/capabilities shows.

A parameter is a field of a model below, with its type and its limits; a known parameter that we do not honour is in REFUSED,
with the values that ask for nothing and pass. What is in neither is accepted, because clients send what their other servers
know, and named in the answer's X-Nanoserve-Ignored header. null means "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from nanoserve.checks import shown
from nanoserve.request import MAX_PRIORITY
from nanoserve.sampling import (
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_BIASED_TOKENS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
    MAX_TEXT,
    MAX_TOKENS,
    MIN_REPETITION_PENALTY,
)
from nanoserve.server.errors import ApiError
from nanoserve.server.settings import ServerSettings

MAX_TOOLS = 128
MAX_TIMEOUT_S = 86_400.0
MAX_USER = 256
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = Field(False, description="A last chunk without choices has the token counts.")
    include_obfuscation: bool | None = Field(None, description="Accepted; chunks are never padded.")


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, max_length=1024)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(BaseModel):
    """What all generating routes take."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str = Field(max_length=256, description="The served model's name.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Most output tokens.")
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="0 and -1 keep all.")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, description="Sequences per prompt.")
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_IDS)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = Field(
        None, max_length=MAX_BIASED_TOKENS, description="Token id to what is added to its logit."
    )
    bad_words: list[StopText] | None = Field(None, max_length=MAX_BAD_WORDS)
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    priority: int | None = Field(
        None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Smaller runs earlier, with the priority policy."
    )
    user: str | None = Field(None, max_length=MAX_USER, description="Goes to the access log.")
    return_token_ids: bool | None = Field(None, description="Choices have token_ids.")
    timeout: float | None = Field(
        None, gt=0, le=MAX_TIMEOUT_S, description="Seconds the request may take in all."
    )
    queue_timeout: float | None = Field(
        None, gt=0, le=MAX_TIMEOUT_S, description="Seconds it may wait for the engine."
    )

    @field_validator("n")
    @classmethod
    def _at_most_max_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        limit = info.context["max_n"] if info.context else None
        if value is not None and limit is not None and value > limit:
            raise ValueError(f"must be at most {limit}")
        return value


class CompletionRequest(SamplingFields):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] = Field(
        description="A text, token ids, or a list of either.", min_length=1
    )
    echo: bool | None = Field(None, description="The text begins with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="With this many likeliest tokens.")
    add_special_tokens: bool | None = Field(
        None, description="Encode with the tokenizer's BOS and the like; true."
    )


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(min_length=1, max_length=64)


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["function"]
    function: FunctionName


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = Field(None, max_length=8192)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["function"]
    function: Function


class ChatRequest(SamplingFields):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096, description="Text only.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="As max_tokens, which it replaces."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: a message has one call at most.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Variables of the template."
    )
    add_generation_prompt: bool | None = None


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=4096)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = Field(None, max_length=256)
    tokens: list[TokenId] = Field(max_length=2**20)


# Known elsewhere, not done here: parameter -> (the values that ask for nothing, why or what to use instead).
_NO, _NOT_YET = (None,), "is not supported"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": ((None, ""), "text cannot be inserted: give what is before it as the prompt"),
    "best_of": ((None, 1), "use n, and choose"),
    "use_beam_search": ((None, False), "there is no beam search"),
    "length_penalty": ((None, 1, 1.0), "there is no beam search"),
    "audio": (_NO, "models here read and write text"),
    "modalities": ((None, ["text"]), "models here read and write text"),
    "prediction": (_NO, _NOT_YET),
    "reasoning_effort": (_NO, "use chat_template_kwargs with what the model's template knows"),
    "verbosity": (_NO, _NOT_YET),
    "web_search_options": (_NO, _NOT_YET),
    "functions": (_NO, "use tools"),
    "function_call": ((None, "none"), "use tool_choice"),
    "store": ((None, False), "nothing is kept"),
    "service_tier": ((None, "auto", "default"), "there is one tier"),
    "cache_salt": (_NO, "the server decides who shares a cache"),
    "chat_template": (_NO, "the model's own template is used"),
    "documents": (_NO, "put them into a message"),
    "continue_final_message": ((None, False), _NOT_YET),
    "guided_json": (_NO, "use response_format"),
    "guided_regex": (_NO, _NOT_YET),
    "guided_choice": (_NO, _NOT_YET),
    "guided_grammar": (_NO, _NOT_YET),
    "structured_outputs": (_NO, "use response_format"),
    "prompt_embeds": (_NO, "prompts are text or token ids"),
    "logits_processors": (_NO, "code from outside is not run"),
    "truncate_prompt_tokens": (_NO, "shorten the prompt"),
    "allowed_token_ids": (_NO, "use logit_bias"),
    "lora_request": (_NO, _NOT_YET),
    "mirostat": ((None, 0), "use temperature, top_k, top_p and min_p"),
    "typical_p": ((None, 1, 1.0), "use temperature, top_k, top_p and min_p"),
    "grammar": (_NO, "use response_format"),
    "samplers": (_NO, "their order is fixed: bias, penalties, temperature, top_k, top_p, min_p"),
}
M = TypeVar("M", bound=BaseModel)


def parse_parameters(
    model: type[M], body: Mapping[str, Any], settings: ServerSettings
) -> tuple[M, list[str]]:
    """The checked request, and the names of what was ignored.

    Raises:
        ApiError: 400 naming the parameter, its value and its limit.
    """
    if issubclass(model, SamplingFields):
        for name in body.keys() & REFUSED.keys():
            neutral, why = REFUSED[name]
            if not any(type(value) is type(body[name]) and value == body[name] for value in neutral):
                raise ApiError(400, f"{name}: {shown(body[name])}: {why}", "unsupported_parameter", name)
    try:
        made = model.model_validate(body, context={"max_n": settings.max_n})
    except ValidationError as error:
        raise _refused(error) from error
    ignored = sorted(set(made.model_extra or ()) - REFUSED.keys())
    (made.model_extra or {}).clear()  # nobody reads the values, and they may be large
    return made, ignored


def _refused(error: ValidationError) -> ApiError:
    """Of a union's complaints the one about the branch that was meant: not another type, and as deep as any."""
    found = max(
        error.errors(include_url=False, include_context=False),
        key=lambda one: (not one["type"].endswith("_type"), len(_place(one["loc"]))),
    )
    place = _place(found["loc"])
    param = (
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or "body"
    )
    code = "missing_required_parameter" if found["type"] == "missing" else "invalid_value"
    if found["type"] == "missing":
        return ApiError(400, f"{param}: is required", code, param)
    reason = found["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {shown(found['input'])}: {reason[:1].lower()}{reason[1:]}", code, param)


def _place(loc: tuple[int | str, ...]) -> list[int | str]:
    """Without the names pydantic gives a union's branches."""
    return [part for part in loc if isinstance(part, int) or part.replace("_", "a").isalnum()]


def capabilities(settings: ServerSettings) -> dict[str, Any]:
    """Parameters by route: JSON schema of those that are honoured, and the refused ones with what to do instead."""
    routes: dict[str, type[BaseModel]] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
        "/tokenize": TokenizeRequest,
        "/detokenize": DetokenizeRequest,
    }
    shown_of = {}
    for route, model in routes.items():
        schema = model.model_json_schema(ref_template="#/definitions/{model}")
        if "n" in schema["properties"]:
            schema["properties"]["n"]["maximum"] = settings.max_n
        shown_of[route] = {
            "honoured": schema["properties"],
            "required": schema.get("required", []),
            "definitions": schema.get("$defs", {}),
            "refused": (
                {
                    name: {"except": [value for value in neutral if value is not None], "instead": why}
                    for name, (neutral, why) in sorted(REFUSED.items())
                }
                if issubclass(model, SamplingFields)
                else {}
            ),
            "unknown": "accepted and named in the X-Nanoserve-Ignored header",
        }
    return shown_of
