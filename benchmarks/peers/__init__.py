"""The same requests against whatever OpenAI-compatible servers are installed here: `python -m benchmarks.peers`."""
