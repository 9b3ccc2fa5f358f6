"""Serves a compiled folder by KServe's model server; what `asapc package --image` writes runs it."""

import asyncio
import logging
import sys
import tomllib
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from asapc.errors import AsapcError, InputError
from asapc.runtime.arrays import by_name, checked
from asapc.runtime.batches import Arrays, Batches, QueueFull
from asapc.runtime.model import load

MODEL, SETTINGS = "model.asap", "settings.toml"
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
# What a request that is refused is told, as HTTP and gRPC number it.
TOO_LARGE, FULL, LATE = (413, "RESOURCE_EXHAUSTED"), (503, "RESOURCE_EXHAUSTED"), (504, "DEADLINE_EXCEEDED")


def serve(folder: Path) -> None:
    """Serve until SIGTERM or SIGINT; requests that were taken are answered first.

    Args:
        folder: what `package_image` wrote. Options on the command line of KServe's server come before its settings.
    """
    settings = tomllib.loads((folder / SETTINGS).read_text())
    limits = settings["limits"]
    lengths = {f"grpc_max_{way}_message_length": limits["body_bytes"] for way in ("receive", "send")}
    # KServe reads the command line when it is imported; of an option given twice the last counts.
    sys.argv[1:1] = [f"--{name}={value}" for name, value in (lengths | settings["kserve"]).items()]
    from kserve import ModelServer
    from kserve.model_server import app

    server = ModelServer(grace_period=limits["grace_seconds"])
    server.model_repository_extension = fixed_repository(server.registered_models)
    if not settings["log"]["requests"]:
        quieten()
    app.add_middleware(BodyLimit, most=limits["body_bytes"])
    server.start([served_model(folder / MODEL, settings["model"], limits)])


def quieten() -> None:
    """Leave out of the log what KServe says of each request, and the traceback of each that it refuses."""
    from kserve.errors import InvalidInput

    def brief(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, InvalidInput):
            record.exc_info, record.msg, record.args = None, f"refused: {error}", ()
        return True

    for name in ("kserve", "kserve.trace", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).addFilter(brief)


def served_model(folder: Path, settings: Scope, limits: Scope) -> Any:
    """Open a compiled folder, warm it up, and return it as KServe's server takes a model.

    Args:
        folder: what `asapc compile` wrote.
        settings: the table `model` of the settings.
        limits: the table `limits`.
    """
    from kserve import InferOutput, InferResponse, Model
    from kserve.errors import InvalidInput
    from kserve.model_server import app
    from kserve.utils.numpy_codec import from_np_dtype
    from kserve.utils.utils import generate_uuid

    compiled = load(folder, settings["device"], settings["threads"]).warmup()
    batches = Batches(compiled, settings["batch"], settings["delay_ms"] / 1000, limits["waiting_requests"])
    refused = refusal(app)

    def tensors(infos: Any) -> list[Scope]:
        return [
            {
                "name": info.name,
                "datatype": from_np_dtype(np.dtype(info.dtype)),
                "shape": [size if isinstance(size, int) else -1 for size in info.shape],
            }
            for info in infos
        ]

    class Compiled(Model):  # type: ignore[misc]
        """Answers requests of either protocol."""

        def get_input_types(self) -> list[Scope]:
            return tensors(compiled.inputs)

        def get_output_types(self) -> list[Scope]:
            return tensors(compiled.outputs)

        async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
            if isinstance(payload, dict):
                raise InvalidInput("this model is served by the v2 protocol, not by v1")
            try:
                inputs = checked(compiled.interface, by_name(compiled.interface, (), arrays(payload)))
                outputs = await asyncio.wait_for(batches(inputs), limits["answer_seconds"])
            except InputError as error:
                raise InvalidInput(f"{error}; {error.hint}") from None
            except QueueFull:
                raise refused("too many requests wait; send it again later", FULL) from None
            except TimeoutError:
                raise refused(f"there was no answer within {limits['answer_seconds']} s", LATE) from None
            except AsapcError as error:
                raise InvalidInput(f"{error}; {error.hint}") from error
            results = [InferOutput(name, [*array.shape], from_np_dtype(array.dtype)) for name, array in outputs.items()]
            for result in results:
                result.set_data_from_numpy(outputs[result.name])
            return InferResponse(
                payload.id or generate_uuid(),
                self.name,
                results,
                use_binary_outputs=payload.use_binary_outputs,
                requested_outputs=payload.request_outputs,
            )

    def arrays(payload: Any) -> Arrays:
        try:
            return {value.name: value.as_numpy() for value in payload.inputs}
        except (ValueError, TypeError, OverflowError) as error:  # sizes that are not those of the shape, say
            raise InvalidInput(f"an input cannot be read: {error}") from None

    model = Compiled(settings["name"])
    model.load()
    return model


def refusal(app: Any) -> Callable[[str, tuple[int, str]], Exception]:
    """Return a class of errors that both protocols tell the client, made known to the application for HTTP."""
    from fastapi.responses import JSONResponse
    from grpc import StatusCode
    from grpc_interceptor.exceptions import GrpcException

    class Refusal(GrpcException):  # type: ignore[misc]
        def __init__(self, details: str, codes: tuple[int, str]) -> None:
            super().__init__(StatusCode[codes[1]], details)
            self.http = codes[0]

    async def tell(request: Any, error: Refusal) -> JSONResponse:
        return JSONResponse({"error": error.details}, error.http)

    app.add_exception_handler(Refusal, tell)
    return Refusal


def fixed_repository(models: Any) -> Any:
    """Return what refuses requests to load or unload models, which whoever reaches a port may send."""
    from kserve.errors import InvalidInput
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension

    class Fixed(ModelRepositoryExtension):  # type: ignore[misc]
        async def load(self, model_name: str) -> None:
            raise InvalidInput("this server has one model, which is neither loaded nor unloaded on request")

        unload = load

    return Fixed(models)


class BodyLimit:
    """Refuses bodies of HTTP requests beyond a size, whatever length they claim; gRPC has such a limit of its own."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on as ASGI applications do."""
        claim = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if scope["type"] == "http" and (not claim.isdigit() or int(claim) > self.most):
            await self.refuse(send)
            return
        size = 0
        answered = False

        async def counted() -> Scope:
            nonlocal size, answered
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most and not answered:
                answered = True
                await self.refuse(send)
            return {"type": "http.disconnect"} if answered else message

        async def unless_answered(message: Scope) -> None:
            if not answered:
                await send(message)

        await self.app(scope, counted, unless_answered)

    async def refuse(self, send: Send) -> None:
        """Answer that the body is too large, and end the connection."""
        body = b'{"error": "a request may have %d bytes"}' % self.most
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": TOO_LARGE[0], "headers": headers})
        await send({"type": "http.response.body", "body": body})
