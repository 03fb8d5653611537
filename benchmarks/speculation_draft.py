"""The draft process of benchmarks.speculation: an order on standard input, then its address on standard output."""

import json
import sys

from benchmarks.speculation import Setting
from benchmarks.synthetic_drafts import Script, scripted
from engine.config import Device, KVCacheDType, Quantization
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.draft_server import DraftServer, LoadedDraft


def main() -> None:
    order = json.loads(sys.stdin.readline())
    fields = order["setting"]
    kinds = {"device": Device, "quantization": Quantization, "kv_cache_dtype": KVCacheDType}
    setting = Setting(**{name: kinds.get(name, lambda value: value)(value) for name, value in fields.items()})
    model = setting.draft_model()
    outputs = {tuple(prompt): output for prompt, output in order["outputs"]}
    scripted(model, Script(outputs, order["acceptance"], model.vocab_size))
    server = DraftServer(LoadedDraft(model, setting.draft_shape, "random"), MirrorKeeper(model))
    server.start()
    print(server.ipc.address, flush=True)
    sys.stdin.read()  # until the benchmark has gone
    server.shutdown()


if __name__ == "__main__":
    main()
