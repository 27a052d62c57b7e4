"""Requests that the page of rae-app never sends, answered before its server sees them."""

from __future__ import annotations

import asyncio
import socket

import pytest

from rae.app.guard import Guard


def answer(names=(), method="POST", path="/", headers=None, pieces=(b"{}",)):
    """Status and text with which a guarded server, which says how much it read, answers one request."""

    async def server(scope, receive, send):
        size, more = 0, scope["method"] == "POST"
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        if path == "/stumbles":
            raise TypeError("'NoneType' object is not subscriptable")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    rest = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    rest[-1]["more_body"] = False

    async def receive():
        return rest.pop(0)

    sent = []

    async def send(message):
        sent.append(message)

    headers = {"host": "127.0.0.1:7860", "content-type": "application/json", **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b""}
    asyncio.run(Guard(server, names)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize(
    ("host", "names", "status"),
    [
        ("localhost:7860", (), 200),
        ("LOCALHOST", (), 200),
        ("[::1]:7860", (), 200),
        ("192.168.1.7:7860", (), 200),
        (socket.gethostname(), (), 200),
        ("evil.example:7860", (), 403),
        ("127.0.0.1.evil.example", (), 403),
        ("localhost.evil.example", (), 403),
        ("", (), 403),
        ("lab.example.org", ("lab.example.org",), 200),
        ("abc.gradio.live", (".gradio.live",), 200),
        ("gradio.live.evil.example", (".gradio.live",), 403),
        ("evilgradio.live", (".gradio.live",), 403),
    ],
)
def test_a_name_that_points_here_is_refused(host, names, status):
    for method in ("GET", "POST"):
        found, text = answer(names, method, headers={"host": host})
        assert found == status
        assert (f"this page is not served as {host!r}" in text) == (status == 403)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:7860", 200),
        ("https://127.0.0.1:7860", 200),
        ("http://127.0.0.1:8000", 403),
        ("http://localhost:7860", 403),
        ("https://evil.example", 403),
        ("http://127.0.0.1:7860.evil.example", 403),
        ("null", 403),
    ],
)
def test_a_page_of_another_origin_is_refused(origin, status):
    for method in ("GET", "POST", "OPTIONS"):
        found, text = answer((), method, headers={"origin": origin})
        assert found == status
        assert ("only the page itself" in text) == (status == 403)


@pytest.mark.parametrize(
    ("headers", "pieces", "status", "text"),
    [
        ({}, [b'{"data": [1', b", 2.5, null]}"], 200, "24"),
        ({}, [b'{"data": [NaN]}'], 400, "NaN is no number"),
        ({}, [b'{"data": [-Infinity]}'], 400, "-Infinity is no number"),
        ({}, [b'{"data": '], 400, "no JSON that this page sends"),
        ({}, [b"\xff\xfe{"], 400, "no JSON that this page sends"),
        ({}, [b'"text"'], 400, "str, not an object"),
        ({}, [b"[" * 100_000], 400, "nested too deeply"),
        ({}, [b" " * 200_000] * 2, 413, "at most 262,144 bytes"),
        ({"content-length": "99999999999"}, [b"{}"], 413, "at most 262,144 bytes"),
        ({"content-length": "-1"}, [b"{}"], 413, "must say truly"),
        ({"content-type": "multipart/form-data"}, [b"x" * 2**20] * 8, 200, str(2**23)),
        ({"content-type": "multipart/form-data"}, [b"x" * 2**20] * 65, 413, "at most 67,174,400 bytes"),
    ],
)
def test_damaged_and_endless_bodies_are_answered_in_a_sentence(headers, pieces, status, text):
    found, said = answer((), "POST", headers=headers, pieces=pieces)
    assert found == status, said
    assert text in said


def test_a_server_that_stumbles_answers_in_a_sentence():
    assert answer(path="/stumbles") == (400, "the request cannot be read; reload the page and try again")
