"""Applications on a real socket, and a server that speaks as vLLM's does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from waiting import eventually

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.teacher.service.listen import listen
from tropd.pipeline.teacher.wire.info import ServiceInfo


def service_info(settings: ServiceConfig) -> ServiceInfo:
    """A teacher of 24 tokens, with the limits of these settings."""
    return ServiceInfo(
        model="toy",
        weights="w",
        tokenizer="t",
        tokenizer_size=24,
        vocab_size=24,
        max_length=64,
        max_request_tokens=settings.max_request_tokens,
        max_request_bytes=settings.max_request_bytes,
        queue_tokens=settings.queue_tokens,
    )


@contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """Run an application in a thread; yields its URL."""
    with listen("127.0.0.1", port) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="auto"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        eventually(lambda: server.started and getattr(app.state, "ready", True), 20, "the server is ready")
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def fake_vllm(
    engine: Any,
    *,
    name: str = "/models/teacher",
    max_logprobs: int = 20,
    decode: Callable[[list[int]], str] | None = None,
    caches: bool = True,
    alter: Callable[[dict[str, Any]], object] = lambda answer: None,
) -> FastAPI:
    """What ``python -m vllm.entrypoints.openai.api_server`` of vLLM 0.32 answers, with the log-probs of an engine.

    Args:
        decode: text of token ids; without it there is no ``/detokenize``.
        caches: whether it has a prefix cache.
        alter: changes an answer in place.

    Requests are kept in ``state.requests``.
    """
    app = FastAPI()
    app.state.requests = []

    def refused(message: str, status: int = 400, param: str | None = None) -> JSONResponse:
        kind = {400: "BadRequestError", 404: "NotFoundError"}[status]
        return JSONResponse(
            {"error": {"message": message, "type": kind, "param": param, "code": status}}, status_code=status
        )

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        card = {
            "id": name,
            "object": "model",
            "created": 1,
            "owned_by": "vllm",
            "root": name,
            "parent": None,
            "max_model_len": engine.max_length,
            "permission": [],
        }
        return {"object": "list", "data": [card]}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(
            f'vllm:cache_config_info{{block_size="16",enable_prefix_caching="{caches}"}} 1.0'
        )

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        body = await request.json()
        if decode is None:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return {"prompt": decode(body["tokens"])}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        app.state.requests.append(body)
        if body.get("model") != name:
            return refused(f"The model `{body.get('model')}` does not exist.", 404, "model")
        param = "logprobs" if "logprobs" in body else "prompt_logprobs"
        k = body[param]
        if k > max_logprobs:
            what = {"logprobs": "sample", "prompt_logprobs": "prompt"}[param]
            return refused(
                f"Requested {what} logprobs of {k}, which is greater than max allowed: {max_logprobs} "
                f"(parameter={param}, value={k})",
                param=param,
            )
        if k > engine.vocab_size:
            raise RuntimeError("selected index k out of range")  # and the engine would be dead
        for prompt in body["prompt"]:
            if len(prompt) >= engine.max_length:
                return refused(
                    f"The decoder prompt (length {len(prompt)}) plus the number of requested output tokens (at "
                    f"least 1) is longer than the maximum model length of {engine.max_length}."
                )
        answer = {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": name,
            "choices": [
                {
                    "index": index,
                    "text": "?",
                    "logprobs": _next_logprobs(engine, prompt, k) if param == "logprobs" else None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "token_ids": None,
                    "prompt_logprobs": None if param == "logprobs" else _prompt_logprobs(engine, prompt, k),
                    "prompt_token_ids": None,
                }
                for index, prompt in enumerate(body["prompt"])
            ],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": {
                "prompt_tokens": sum(map(len, body["prompt"])),
                "completion_tokens": len(body["prompt"]),
            },
        }
        alter(answer)
        return JSONResponse(answer)

    return app


def _prompt_logprobs(engine: Any, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
    """One entry per token: the token itself, then the k likeliest."""
    (scored,) = engine.score([prompt], [1], k=max(k, 1))
    result: list[dict[str, Any] | None] = [None]
    for place, token in enumerate(prompt[1:]):
        ranks = {int(i): r for r, i in enumerate(scored.topk_ids[place], start=1)}
        entries = {str(token): _entry(scored.token_logprobs[place], ranks.get(token, k + 2), token)}
        for i, value in zip(scored.topk_ids[place][:k], scored.topk_logprobs[place][:k], strict=True):
            entries[str(int(i))] = _entry(value, ranks[int(i)], int(i))
        result.append(entries)
    return result


def _next_logprobs(engine: Any, prompt: list[int], k: int) -> dict[str, Any]:
    """Of the token after a prompt: what a teacher says of any token there, with its alternatives."""
    (scored,) = engine.score([[*prompt, 0]], [len(prompt)], k=k)
    top = {
        f"token_id:{i}": max(float(value), -9999.0)
        for i, value in zip(scored.topk_ids[0].tolist(), scored.topk_logprobs[0], strict=True)
    }
    name = next(iter(top))
    return {"text_offset": [0], "token_logprobs": [top[name]], "tokens": [name], "top_logprobs": [top]}


def _entry(logprob: float, rank: int, token: int) -> dict[str, Any]:
    return {"logprob": max(float(logprob), -9999.0), "rank": rank, "decoded_token": f"<{token}>"}
