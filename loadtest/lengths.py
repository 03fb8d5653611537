"""How long prompts and answers are, in tokens: log-normal distributions after published numbers."""

import math
import random
from dataclasses import dataclass

_VLLM = "Kwon et al., SOSP 2023 (vLLM), figure 11"
_AZURE = (
    "Azure LLM inference trace 2023: medians from Patel et al., ISCA 2024 (Splitwise); means of the published trace"
)
# The vLLM paper gives means alone. This spread is that of the trace's conversations, whose prompts and answers have a
# sigma of 0.50 and 0.99: in between, for both.
_USUAL_SIGMA = 0.7


@dataclass(frozen=True)
class LogNormal:
    """A number of tokens, at least 1. `source` says where median and mean come from."""

    median: float
    mean: float
    source: str

    @classmethod
    def from_mean(cls, mean: float, sigma: float, source: str) -> "LogNormal":
        """For sources that give a mean only; `sigma` is that of the logarithm."""
        return cls(mean / math.exp(sigma**2 / 2), mean, f"mean from {source}; sigma {sigma} chosen here")

    @property
    def sigma(self) -> float:
        """Of the logarithm: mean = median · exp(sigma² / 2)."""
        return math.sqrt(2 * math.log(self.mean / self.median))

    def draw(self, draw: random.Random) -> int:
        return max(1, round(draw.lognormvariate(math.log(self.median), self.sigma)))


ALPACA_PROMPT = LogNormal.from_mean(19.31, _USUAL_SIGMA, f"Alpaca in {_VLLM}")
ALPACA_ANSWER = LogNormal.from_mean(58.45, _USUAL_SIGMA, f"Alpaca in {_VLLM}")
SHAREGPT_PROMPT = LogNormal.from_mean(161.31, _USUAL_SIGMA, f"ShareGPT in {_VLLM}")
SHAREGPT_ANSWER = LogNormal.from_mean(337.99, _USUAL_SIGMA, f"ShareGPT in {_VLLM}")
AZURE_CODE_PROMPT = LogNormal(1500, 2048, f"coding in {_AZURE}")
AZURE_CODE_ANSWER = LogNormal(13, 28, f"coding in {_AZURE}")
# The five-example prefix of the vLLM paper's section 6.4 has this length.
FEW_SHOT_PREFIX_TOKENS = 341
EDITED_CODE = LogNormal(180, 220, "chosen here: no published trace has edits that return the whole file")
