"""python -m tests.cluster: the whole story, with its times."""

import sys

from engine.loader.catalogue import DEFAULT_MODEL
from engine.loader.fetch import resolve_model
from engine.loader.progress import PlainProgress
from serve_app.config import cache_dir
from tests.cluster.isolation import NotPermittedError
from tests.cluster.launch import run_isolated

resolve_model(DEFAULT_MODEL, cache_dir=cache_dir(), progress=PlainProgress(print))  # inside there is no network
try:
    report = run_isolated(print)
except NotPermittedError as error:
    sys.exit(str(error))
sys.exit(len(report.passed) != 3)
