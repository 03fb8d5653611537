"""The OpenAI-shaped HTTP API over any admitter; knows nothing of Ray."""

from serve_app.http.application import build_http_app

__all__ = ["build_http_app"]
