"""What tests share: the default model's file, one Ray cluster, and the service on it. Each is made when first used."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# libgomp reads it when torch is imported. On two cores, two processes that spin at each other's barriers stand still.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter where there is no GPU; that is decided when they are first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them ignore interrupts, and so every server that they start and
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SERVICE_ARGUMENTS = {
    "device": "cpu",
    "max_model_len": "512",
    "max_num_seqs": "32",
    "token_budget": "256",
    "num_kv_blocks": "512",
    "max_queued_requests": "256",
}


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """The names of tests go from process to process, time and again: not with parameters of megabytes in them."""
    is_long = isinstance(val, str | bytes) and len(val) > 200
    return f"{argname} of {len(val)}" if is_long else None  # type: ignore[arg-type]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the cluster runs in one process, which then has the only one; and first, since it takes long."""
    for item in items:
        if "serve_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("cluster"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws does not depend on those before it. And a pytest-xdist that groups nothing says nothing: two
    clusters on two cores then make tests fail at random."""
    torch.manual_seed(0)  # not Python's own generator, which Serve draws the ids of its requests from
    is_grouped = not hasattr(item.config, "workerinput") or "@" in item.nodeid
    if item.get_closest_marker("xdist_group") is not None and not is_grouped:
        pytest.fail(f"pytest {pytest.__version__} and this pytest-xdist do not group tests", pytrace=False)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model, fetched into the user's cache if it is not there."""
    from engine.loader.catalogue import DEFAULT_MODEL
    from engine.loader.fetch import resolve_model
    from engine.loader.progress import PlainProgress
    from serve_app.config import cache_dir

    return resolve_model(DEFAULT_MODEL, cache_dir=cache_dir(), progress=PlainProgress(print))


@pytest.fixture(scope="session")
def serve_cluster() -> Iterator[str]:
    """Ray and Serve for the whole session; the base URL of Serve's proxy."""
    import ray
    from ray import serve

    from serve_app.ports import free_port

    port = free_port("127.0.0.1")
    # More logical CPUs than the machine may have: what is scarce here is cores, not Ray's count of them.
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level="warning",
        _system_config={"metrics_report_interval_ms": 1000},  # 10 s is long to wait for what tests look at
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@dataclass(frozen=True)
class Service:
    """The application under test: `url` is its root, `application` its name in Serve."""

    url: str
    application: str

    def stats(self):  # type: ignore[no-untyped-def]
        """EngineStats of its engine replica."""
        from ray import serve

        handle = serve.get_deployment_handle("engine", self.application)
        return handle.stats.remote().result(timeout_s=60)


@pytest.fixture(scope="session")
def service(serve_cluster: str, default_model_path: Path) -> Service:  # noqa: ARG001 - fetched before replicas start
    """The default model behind the whole service, on the CPU."""
    from ray import serve

    from serve_app import app

    serve.run(app(dict(SERVICE_ARGUMENTS)), name="default", route_prefix="/")
    return Service(serve_cluster, "default")
