"""Clients that wait for an answer for as long as a test wants them to."""

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit


@contextmanager
def held_request(url: str, body: dict[str, Any], key: str = "") -> Iterator[None]:
    """It is sent, and its client leaves in the end."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request("POST", parts.path, json.dumps(body), headers)
        yield
    finally:
        connection.close()
