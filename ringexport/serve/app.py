"""The ASGI application: routes, and every error in one form."""

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ringexport.runtime.session import Engine
from ringexport.serve.body import read_json
from ringexport.serve.errors import ApiError, JsonReply
from ringexport.serve.gate import CLIENT_GONE, Gate
from ringexport.serve.generation import ClientGoneError
from ringexport.serve.metrics import Metrics
from ringexport.serve.options import ServeOptions
from ringexport.serve.page import page_response
from ringexport.serve.requests import read_chat, read_completion
from ringexport.serve.service import Batcher, Service

__all__ = ["create_app"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(engine: Engine, batching: Batcher, options: ServeOptions | None = None) -> Starlette:
    """Return the application.

    Args:
        engine: for its tokenizer, template and sizes.
        batching: runs the requests; who made it closes it.
        options: limits.
    """
    options = options or ServeOptions()
    metrics = Metrics(batching.stats)
    service = Service(engine, batching, options, metrics)
    handlers = _Handlers(service, batching, metrics, options)
    app = Starlette(
        routes=[
            Route("/", handlers.page),
            Route("/health", handlers.health),
            Route("/metrics", handlers.metrics),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{name:path}", handlers.model),
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, options=options, metrics=metrics)],
        exception_handlers={
            ApiError: _on_api_error,
            ClientGoneError: _on_client_gone,
            HTTPException: _on_http_error,
            Exception: _on_bug,
        },
    )
    app.router.redirect_slashes = False  # it would send clients to wherever their Host says
    app.state.service = service
    return app


class _Handlers:
    """One method per route."""

    def __init__(
        self, service: Service, batching: Batcher, metrics: Metrics, options: ServeOptions
    ) -> None:
        self._service, self._batching = service, batching
        self._metrics, self._options = metrics, options
        self._created = int(time.time())

    async def page(self, request: Request) -> Response:
        """GET /."""
        del request
        return page_response()

    async def health(self, request: Request) -> Response:
        """GET /health."""
        del request
        if self._service.draining or not self._batching.alive:
            return JsonReply({"status": "shut down"}, status_code=503)
        return JsonReply({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        del request
        return Response(self._metrics.render(), headers={"Content-Type": METRICS_TYPE})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        del request
        return JsonReply({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        if request.path_params["name"] != self._options.model_name:
            raise ApiError("there is no such model", status=404, code="model_not_found")
        return JsonReply(self._model())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        data = await read_json(request, self._options)
        wanted = read_chat(data, self._options, context=self._service.context)
        return await self._service.chat(request, wanted)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        data = await read_json(request, self._options)
        wanted = read_completion(data, self._options, context=self._service.context)
        return await self._service.complete(request, wanted)

    def _model(self) -> dict[str, object]:
        return {
            "id": self._options.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "ringexport",
            "context_length": self._service.context,
        }


async def _on_api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return error.response()


async def _on_client_gone(request: Request, error: Exception) -> Response:
    del error
    request.scope.setdefault("state", {})["outcome"] = "disconnected"
    return Response(status_code=CLIENT_GONE)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is nothing at {request.url.path!r:.80}",
        405: f"{request.method} is not possible at {request.url.path!r:.80}",
    }
    message = messages.get(error.status_code, "the request cannot be answered")
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(message, status=error.status_code, code=code, headers=error.headers).response()


async def _on_bug(request: Request, error: Exception) -> Response:
    """Answer a bug without a word about it; the server logs its traceback."""
    del request, error
    message, close = "the server failed on this request", {"Connection": "close"}
    return ApiError(message, status=500, code="bug", headers=close).response()
