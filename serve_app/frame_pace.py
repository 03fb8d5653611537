"""How often the groups of a replica get frames: as often as what a frame costs allows."""

# Of the replica's event loop, which shares the interpreter's lock with the engine thread: a frame takes 0.1 ms through
# Serve, so 2,000 a second are a fifth of a core. And of what comes behind, where each request's part of a frame is a
# chunk: 16 cores passed some 25,000 a second on to clients, and 10,000 leave the engine its share.
FRAME_S = 0.5e-3
CHUNK_S = 0.1e-3
MAX_PAUSE_S = 0.2  # before a reader would notice, or take it for silence


class FramePace:
    """Of one replica, whose groups count in it while they have tokens under way.

    Few streams get each token in a chunk of its own. With many, tokens gather meanwhile, so that more of them are
    served for the same work (vLLM has one number for the same purpose, `stream_interval`).
    """

    def __init__(self, frame_s: float = FRAME_S, chunk_s: float = CHUNK_S) -> None:
        """What a frame of a group, and what a request's part in one, may take of a second."""
        self.num_groups = 0
        self.num_requests = 0
        self._frame_s = frame_s
        self._chunk_s = chunk_s

    @property
    def pause_s(self) -> float:
        """Between two frames of a group."""
        return min(MAX_PAUSE_S, max(self.num_groups * self._frame_s, self.num_requests * self._chunk_s))
