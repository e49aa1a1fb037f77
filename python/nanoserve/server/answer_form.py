"""What an answer must look like, as sampling parameters: response_format, tools and what cannot go with them."""

from __future__ import annotations

from typing import Any

from nanoserve.checks import shown
from nanoserve.server.errors import ApiError, bad_request
from nanoserve.server.parameters import ChatRequest, NamedTool, SamplingFields
from nanoserve.server.tool_calls import ToolFormat, forced_calls
from nanoserve.structured import StructuredOutputs


def check_combinations(request: SamplingFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: needs stream: true", "invalid_value", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs: cannot be streamed", "unsupported_parameter", "prompt_logprobs")


def structured_format(request: SamplingFields) -> dict[str, Any]:
    """`response_format` as sampling parameters."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        if wanted is not None and wanted.json_schema is not None:
            raise ApiError(
                400,
                "response_format.json_schema: needs type json_schema",
                "invalid_value",
                "response_format",
            )
        return {}
    if wanted.type == "json_object":
        return {"structured_outputs": StructuredOutputs(json_object=True)}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(
            400,
            "response_format.json_schema.schema: is required",
            "missing_required_parameter",
            "response_format",
        )
    try:
        return {"structured_outputs": StructuredOutputs(json=wanted.json_schema.schema_)}
    except ValueError as error:
        raise bad_request(error, {"structured_outputs.json": "response_format.json_schema.schema"}) from error


def tools_of(
    request: ChatRequest, known: ToolFormat | None, more: dict[str, Any]
) -> tuple[ToolFormat | None, list[dict[str, Any]] | None]:
    """The format to look for calls in, and the tools that the template gets; a forced choice adds to `more`.

    Args:
        known: how the model writes calls, if it does.
        more: sampling parameters that follow from the request.
    """
    choice = request.tool_choice or ("auto" if request.tools else "none")
    if not request.tools:
        if choice != "none":
            raise ApiError(400, "tool_choice: needs tools", "invalid_value", "tool_choice")
        return None, None
    names = [tool.function.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two have the same name", "invalid_value", "tools")
    if choice == "none":
        return None, None
    if known is None:
        raise ApiError(
            400, "tools: this model's chat template knows no tool calls", "unsupported_parameter", "tools"
        )
    if more.get("structured_outputs") is not None:
        raise ApiError(400, "tools: cannot go with response_format", "unsupported_parameter", "tools")
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    if choice == "auto":
        if strict := [tool.function.name for tool in request.tools if tool.function.strict]:
            raise ApiError(
                400, f"tools: strict, of {shown(strict[0])}, needs tool_choice required or that function", "unsupported_parameter",
                "tools",
            )  # fmt: skip
    else:
        functions = [tool["function"] for tool in tools]
        if isinstance(choice, NamedTool):
            functions = [function for function in functions if function["name"] == choice.function.name]
            if not functions:
                raise ApiError(
                    400,
                    f"tool_choice: {shown(choice.function.name)} is none of the tools",
                    "invalid_value",
                    "tool_choice",
                )
        try:
            several = not isinstance(choice, NamedTool) and request.parallel_tool_calls is not False
            tagged = forced_calls(known, functions, several)
            more["structured_outputs"] = StructuredOutputs(tagged=tagged)
        except ValueError as error:
            raise bad_request(error, {"structured_outputs.tagged.json": "tools"}) from error
    more.setdefault("skip_special_tokens", False)  # what calls begin and end with may be special
    return known, tools
