"""All peers, in the order in which they take turns."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.peers.llama_cpp_python import LlamaCppPython
from benchmarks.peers.llama_server import LlamaServer
from benchmarks.peers.peer import Peer
from benchmarks.peers.ray_serve_llm import RayServeLLM
from benchmarks.peers.sglang import SGLang
from benchmarks.peers.slipstream import Slipstream, SlipstreamNgram
from benchmarks.peers.transformers_serve import TransformersBatching, TransformersServe
from benchmarks.peers.vllm import VLLM

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        *(Slipstream, SlipstreamNgram, VLLM, SGLang, LlamaServer),
        *(LlamaCppPython, RayServeLLM, TransformersServe, TransformersBatching),
    )
}


@dataclass(frozen=True)
class Subject:
    """A peer in one number format."""

    peer: Peer
    number_format: str

    @property
    def title(self) -> str:
        return f"{self.peer.name}:{self.number_format}"


def parse_subjects(text: str, programs: Mapping[str, str]) -> list[Subject]:
    """`text` is like `slipstream,llama-server:Q8_0`; a peer without a format has its first one.

    Raises:
        ValueError: a peer or a format is not known.
    """
    subjects = []
    for part in text.split(","):
        name, _, number_format = part.strip().partition(":")
        if name not in PEERS:
            raise ValueError(f"{name!r} is not a peer; known are {', '.join(PEERS)}")
        formats = PEERS[name].formats
        if number_format and number_format not in formats:
            raise ValueError(f"{name} has no format {number_format!r}; it has {', '.join(formats)}")
        subjects.append(Subject(PEERS[name](programs.get(name) or default_program(name)), number_format or formats[0]))
    if len({subject.title for subject in subjects}) < len(subjects):
        raise ValueError(f"{text}: a peer twice in one format")
    return subjects


def parse_programs(given: list[str]) -> dict[str, str]:
    """Of `peer=/path/to/python`. Raises ValueError."""
    programs = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in PEERS or not path:
            raise ValueError(f"{text!r} is not like peer=/path/to/python, with a peer out of {', '.join(PEERS)}")
        if shutil.which(path) is None:
            raise ValueError(f"{text}: there is no such program")
        programs[name] = path
    return programs


def default_program(name: str) -> str:
    """This interpreter; of llama.cpp, the binary on the path."""
    return LlamaServer.name if name == LlamaServer.name else sys.executable
