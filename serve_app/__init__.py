"""The service: HTTP, admission and deployments around the engine. `serve run serve_app:app` starts it."""

from serve_app.app import app

__all__ = ["app"]
