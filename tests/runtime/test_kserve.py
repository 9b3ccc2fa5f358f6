"""The limit of bodies; the rest is tested with KServe's server, in serving/test_image_server.py."""

import asyncio

import pytest

from asapc.runtime.kserve import BodyLimit


def answer(chunks: list[bytes], headers=(), most: int = 10) -> tuple[int, bytes]:
    """Status and body that an application which returns a request's body gives behind the limit."""
    sent, waiting = [], [*chunks]

    async def app(scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def receive():
        chunk = waiting.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    asyncio.run(BodyLimit(app, most)({"type": "http", "headers": headers}, receive, send))
    start, body = sent
    return start["status"], body["body"]


def test_bodies_within_the_limit_pass():
    assert answer([b"12345", b"67890"]) == (200, b"1234567890")
    assert answer([b"12345"], [(b"content-length", b"5")]) == (200, b"12345")


@pytest.mark.parametrize(
    ("chunks", "headers"),
    [
        ([b"x" * 11], [(b"content-length", b"11")]),
        ([b"x"], [(b"content-length", b"-1")]),
        ([b"x" * 6, b"x" * 6], []),
        ([b"x" * 6, b"x" * 6], [(b"content-length", b"5")]),
    ],
)
def test_larger_ones_are_refused_whatever_length_they_claim(chunks, headers):
    status, body = answer(chunks, headers)
    assert (status, body) == (413, b'{"error": "a request may have 10 bytes"}')
