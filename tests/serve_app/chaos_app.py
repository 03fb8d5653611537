"""What the chaos run is tried on: a model of random weights, quick on a CPU; and the service with a part taken out."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from serve_app.app import bind, load_draft, load_engine, load_served_model
from serve_app.config import AppConfig, parse_config
from tests.serve_app.fake_engine import load_fake_engine
from tests.tiny_models import write_tiny_model

if TYPE_CHECKING:
    from engine.llm_engine import LLMEngine
    from engine.request import RequestOutput
    from serve_app.draft_link import Resolve
    from serve_app.ingress import ServedModel

PACE_S = 0.05


def app(args: dict[str, Any]) -> Any:
    return _build(args, load_served_model)


def without_cancelling(args: dict[str, Any]) -> Any:
    """A replica that wakes up goes on with what it had been doing: the numbers of the attempts alone keep it apart."""
    return _build(args, partial(_load_without, take_out_cancelling))


def without_fencing(args: dict[str, Any]) -> Any:
    """Nor do the numbers."""
    return _build(args, partial(_load_without, take_out_fencing))


def without_resumption(args: dict[str, Any]) -> Any:
    return _build(args, partial(_load_without, take_out_resumption))


def paced(args: dict[str, Any]) -> Any:
    """Its steps take as long as those of a large model on a GPU, and leave the CPU to everybody else meanwhile."""
    return _build(args, load_served_model, _load_paced)


def _load_paced(config: AppConfig, find_drafts: "Resolve | None" = None) -> "LLMEngine":
    """Runs in an engine replica."""
    from engine.llm_engine import LLMEngine

    step = LLMEngine.step

    def paced_step(self: LLMEngine) -> "list[RequestOutput]":
        time.sleep(PACE_S)
        return step(self)

    LLMEngine.step = paced_step  # type: ignore[method-assign]
    return load_engine(config, find_drafts)


def scripted(args: dict[str, Any]) -> Any:
    """An engine without a model, as fast as everything else lets it be: what is measured is the way to the client."""
    config = parse_config({"device": "cpu"} | args)
    return bind(config, load_fake_engine, partial(load_served_model, config))


def take_out_cancelling() -> None:
    """Of this process: calls that are over go on."""
    from serve_app.group import Group

    def close(self: Group) -> None:
        self.is_over = True

    Group.close = close  # type: ignore[method-assign]


def take_out_fencing() -> None:
    """Of this process, whose streams then believe every attempt."""
    from serve_app.token_stream import RequestStream

    take_out_cancelling()
    receive = RequestStream.receive
    RequestStream.receive = lambda self, _, output: receive(self, self.attempt, output)  # type: ignore[method-assign]


def take_out_resumption() -> None:
    """Of this process, which then gives up what it has lost."""
    from serve_app.errors import UnavailableError
    from serve_app.group import PlacedPrompt

    PlacedPrompt.lose = lambda self, *_, **__: self.end(UnavailableError("lost"))  # type: ignore[method-assign]


def _load_without(take_out: Callable[[], None], config: AppConfig) -> "ServedModel":
    """Runs in an ingress replica."""
    take_out()
    return load_served_model(config)


def _build(args: dict[str, Any], load_model: Any, load: Any = load_engine) -> Any:
    config = parse_config({"device": "cpu", "num_kv_blocks": 512, "max_model_len": 1024, "num_threads": 1} | args)
    model = Path(gettempdir()) / "slipstream-chaos-model"
    if not (model / "model.safetensors").exists():
        write_tiny_model(model, vocab_size=49152)
    weights = {"model": str(model)}
    drafts = None
    if config.speculative == "remote":
        drafts = partial(load_draft, config.model_copy(update={"draft_model": str(model)}))
    engine = config.model_copy(update=weights)
    return bind(config, partial(load, engine), partial(load_model, config), drafts)
