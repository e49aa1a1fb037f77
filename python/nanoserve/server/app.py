"""The routes. Each reads its body strictly, checks it against its table, and answers in OpenAI's form."""

from __future__ import annotations

from importlib.resources import files
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from nanoserve.server.answer import Answer
from nanoserve.server.errors import ApiError, ClientGone
from nanoserve.server.event_stream import EventStream, error_response, unless_disconnected
from nanoserve.server.guard import CLIENT_CLOSED, INTERNAL, Guard
from nanoserve.server.health import Health
from nanoserve.server.metrics import CONTENT_TYPE, Metrics
from nanoserve.server.parameters import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    capabilities,
)
from nanoserve.server.service import Caller, Service

IGNORED = "X-Nanoserve-Ignored"
MAX_IGNORED_BYTES = 2048
_GENERATING: dict[str, type[CompletionRequest] | type[ChatRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def build_app(service: Service, metrics: Metrics, health: Health) -> Guard:
    """The application, guarded."""
    settings = service.settings
    bodies = service.bodies
    app = FastAPI(
        title="nanoserve",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        separate_input_output_schemas=False,
        redirect_slashes=False,  # a redirect would go where the Host header says
    )

    def generating(path: str, model: type[CompletionRequest] | type[ChatRequest]) -> None:
        @app.post(path, openapi_extra=_body_schema(model, service), responses=_RESPONSES, name=path)
        async def _(request: Request) -> Response:
            request.state.route = path
            about = request.state.about
            async with bodies.parameters(request, model) as (parsed, ignored):
                about["user"] = parsed.user
                caller = _caller(request)
                if isinstance(parsed, ChatRequest):
                    work = service.chat(parsed, caller)
                else:
                    assert isinstance(parsed, CompletionRequest)
                    work = service.complete(parsed, caller)
                answer = await unless_disconnected(request.receive, work)
            if answer is None:
                raise ClientGone
            headers = _ignored(ignored)
            answer.call.open()
            if parsed.stream:
                return EventStream(
                    answer.events(), answer.ending, request_id=request.state.request_id, headers=headers, on_close=lambda: _close(answer, about)
                )  # fmt: skip
            try:
                whole = await unless_disconnected(request.receive, answer.whole())
            finally:
                _close(answer, about)
            if whole is None:
                raise ClientGone
            return JSONResponse(whole, headers=headers)

    for path, model in _GENERATING.items():
        generating(path, model)

    @app.get("/v1/models")
    async def _() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", responses=_RESPONSES)
    async def _(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.get("/v1/capabilities")
    async def _() -> dict[str, Any]:
        return {
            "model": _model(service),
            "determinism": {
                "bit_exact": True,
                "meaning": "a request's tokens and log-probabilities do not depend on what else runs, on the prefix cache, on "
                "chunking or on preemption; without a seed, a request that samples gets one by its order of arrival",
            },
            "arithmetic": {
                "gemm": service.llm.precision.arithmetic, "kv_cache": service.llm.precision.kv_cache,
            },
            "tool_calls": None if service.tool_format is None else service.tool_format.name,
            "chat": service.llm.chat_template is not None,
            "limits": {
                name: getattr(settings, name)
                for name in (
                    "max_body_bytes", "max_pending_bytes", "max_header_bytes", "max_json_depth", "max_connections", "max_n", "max_prompts",
                    "max_sequences", "max_queue_requests",
                    "max_queue_tokens", "max_requests_per_key", "queue_timeout_s", "request_timeout_s", "read_timeout_s",
                    "stall_timeout_s",
                )
            },
            "prefix_cache": "shared" if settings.share_prefix_cache else "per key",
            "routes": capabilities(settings),
        }  # fmt: skip

    @app.post("/tokenize", openapi_extra=_body_schema(TokenizeRequest, service), responses=_RESPONSES)
    async def _(request: Request) -> Response:
        async with bodies.parameters(request, TokenizeRequest) as (parsed, ignored):
            work = service.tokenize(parsed, _caller(request))
            return _answer(await unless_disconnected(request.receive, work), ignored)

    @app.post("/detokenize", openapi_extra=_body_schema(DetokenizeRequest, service), responses=_RESPONSES)
    async def _(request: Request) -> Response:
        async with bodies.parameters(request, DetokenizeRequest) as (parsed, ignored):
            work = service.detokenize(parsed, _caller(request))
            return _answer(await unless_disconnected(request.receive, work), ignored)

    @app.get("/health/live")
    async def _() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready", responses=_RESPONSES)
    @app.get("/health", responses=_RESPONSES)
    async def _() -> Response:
        status, body = health.report()
        return JSONResponse(body, status, headers={} if status == 200 else {"Retry-After": "1"})

    @app.get("/metrics")
    async def _() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE)

    if settings.page:
        folder = files("nanoserve.server") / "page"

        @app.get("/engine/state")
        async def _() -> dict[str, Any]:
            return health.engine_state()

        for path, (name, kind) in _PAGE.items():
            content = (folder / name).read_bytes()

            @app.get(path, include_in_schema=False)
            async def _(content: bytes = content, kind: str = kind) -> Response:
                return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        return error_response(error, request.state.request_id)

    @app.exception_handler(ClientGone)
    async def _(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return error_response(INTERNAL, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        made = ApiError(
            error.status_code,
            f"{request.method} {request.scope['path'][:200]}: {error.detail}",
            code,
            headers=error.headers,
        )
        return error_response(made, request.state.request_id)

    return Guard(app, settings, metrics, doors=dict.fromkeys(_GENERATING, service.gateway.check_open))


def _close(answer: Answer, about: dict[str, Any]) -> None:
    """However it ended, nothing of it stays; the access log says what it was."""
    jobs = answer.call.jobs
    first = jobs[0]
    about["prompt_tokens"] = sum(job.prompt_tokens for job in jobs)
    about["output_tokens"] = sum(job.output_tokens for job in jobs)
    about["ttft"] = None if first.first_token_s is None else round(first.first_token_s - first.received_s, 6)
    about["queued"] = None if first.started_s is None else round(first.started_s - first.received_s, 6)
    about["finish"] = sorted({reason for job in jobs for reason in job.finish_reasons}) or None
    answer.call.close()


def _caller(request: Request) -> Caller:
    state = request.state
    return Caller(state.key, state.owner, state.received_s, getattr(state, "accepted_s", state.received_s))


def _answer(content: dict[str, Any] | None, ignored: list[str]) -> Response:
    if content is None:
        raise ClientGone
    return JSONResponse(content, headers=_ignored(ignored))


def _ignored(names: list[str]) -> dict[str, str]:
    """The header that names them: what a header cannot hold is percent-encoded, and of very many the first are named."""
    if not names:
        return {}
    listed: list[str] = []
    size = 0  # proxies take some KiB of headers
    for name in names[:32]:
        listed.append(quote(name[:64], safe=" !#$&'()*+-./:<=>?@[]^_`{|}~"))
        size += len(listed[-1])
        if size > MAX_IGNORED_BYTES:
            break
    more = len(names) - len(listed)
    return {IGNORED: ", ".join(listed) + (f", and {more} more" if more else "")}


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model, "object": "model", "created": service.created, "owned_by": "nanoserve",
        "max_model_len": service.max_model_len,
    }  # fmt: skip


def _body_schema(model: type[BaseModel], service: Service) -> dict[str, Any]:
    """For /openapi.json: bodies are read by us, and strictly; what depends on the server is filled in."""
    schema = model.model_json_schema()
    properties = schema["properties"]
    properties["model"]["enum"] = [service.model]
    for name, most in (("n", service.settings.max_n), ("max_tokens", service.max_model_len - 1)):
        for kind in properties.get(name, {}).get("anyOf", ()):
            if kind["type"] == "integer":
                kind["maximum"] = most
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Without $defs, which OpenAPI would look for elsewhere."""
    definitions = schema.get("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if set(node) == {"$ref"} or ("$ref" in node and len(node) <= 3):
                return resolved(definitions[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items() if key != "$defs"}
        return [resolved(one) for one in node] if isinstance(node, list) else node

    made: dict[str, Any] = resolved(schema)
    return made


_ERROR = {
    "description": "OpenAI's error object",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {"message": {"type": "string"}},
                        "required": ["message"],
                    }
                },
                "required": ["error"],
            }
        }
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = dict.fromkeys(
    (400, 401, 404, 405, 408, 413, 415, 421, 429, 431, 500, 503, 504), _ERROR
)
