"""How long prompts and answers are, in tokens: log-normal distributions after published numbers.

- vLLM: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023. The
  legend of figure 11 has the means: ShareGPT 161.31 and 337.99, Alpaca 19.31 and 58.45 (8.4 and 5.8 times, says the
  text). Tokens are those of OPT's tokenizer; of a ShareGPT conversation, only the first turn counts. The five-example
  prefix of section 6.4 (figure 16 b) has 341 tokens.
- Splitwise: Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024, section 3:
  medians of 1,500 and 13 tokens for coding, 1,020 and 129 for conversations.
- The trace that Splitwise describes: github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_code.csv (8,819
  requests of November 2023) and _conv.csv. Its means, 2,048 and 28 for coding and 1,155 and 211 for conversations, are
  in neither paper nor description, and have not been computed again here.

All else was checked against the texts of the papers. What was chosen here says so.
"""

import math
import random
from dataclasses import dataclass

_VLLM = "Kwon et al., SOSP 2023 (vLLM), figure 11"
_AZURE = "Azure LLM inference trace 2023: medians from Patel et al., ISCA 2024 (Splitwise); means of the trace itself"
# The vLLM paper gives means alone. Median and mean of the trace's conversations make a sigma of 0.50 for prompts and of
# 0.99 for answers: this is in between, for both.
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
