"""What both generation endpoints accept, validated strictly: nothing is converted, nothing unknown is ignored."""

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Annotated, Any, ClassVar, Protocol, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from engine.errors import InvalidRequest
from engine.request import MAX_LOGPROBS, MAX_STOP_STRINGS, SEED_BITS, SamplingParams
from serve_app.http import unsupported
from serve_app.http.limits import (
    MAX_COUNT,
    MAX_METADATA,
    MAX_N,
    MAX_PRIORITY,
    MAX_STOP_CHARS,
    MAX_TOKEN_ID,
    MAX_TOKEN_LIST,
)

UNSUPPORTED_CODE = "unsupported_parameter"
UNKNOWN_CODE = "unknown_parameter"

M = TypeVar("M", bound=BaseModel)


class FieldError(ValueError):
    """Raised by a validator: `text` goes on from the field's path ("must be ..."), which `field` extends."""

    def __init__(self, text: str, field: str = "", code: str | None = None) -> None:
        super().__init__(text)
        self.field = field
        self.code = code


class Wire(BaseModel):
    """Base of everything a client sends. A null field counts as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[Mapping[str, unsupported.Harmless]] = {}  # by name, except with the values listed

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data  # pydantic says what is wrong with it
        kept = {}
        for name, value in data.items():
            if value is None:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.refused:
                raise FieldError("is not a parameter of this endpoint", name[:100], UNKNOWN_CODE)
            elif not any(type(value) is type(same) and value == same for same in cls.refused[name]):
                raise FieldError(_unsupported_text(cls.refused[name]), name, UNSUPPORTED_CODE)
        return kept


def parse(model: type[M], payload: Any) -> M:
    """`payload`, as parsed from JSON, as a `model`.

    Raises:
        InvalidRequest: the first thing wrong with it; `param` is the field's path, such as "messages[2].content".
    """
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
    cause = first.get("ctx", {}).get("error")
    code = None
    if isinstance(cause, FieldError):
        joint = "" if cause.field.startswith("[") or not cause.field else "."
        path, text, code = f"{path}{joint}{cause.field}", str(cause), cause.code
    elif first["type"] == "missing":
        text = "is required"
    elif first["type"] == "model_type":
        text = "must be a JSON object"
    else:
        text = re.sub("^(Input|List) should", "must", first["msg"]).replace(" after validation", "")
    param = path.removeprefix(".")
    raise InvalidRequest(f"{param or 'the body'} {text}", param or None, code=code)


class SamplingDefaults(Protocol):
    """The model's own generation settings, for what the client leaves out; None: the API's default."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...


def _parse_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FieldError("must be a string or a list of strings")
    if len(texts) > MAX_STOP_STRINGS or not all(0 < len(text) <= MAX_STOP_CHARS for text in texts):
        raise FieldError(f"must be up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters each")
    return tuple(texts)


def _parse_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise FieldError("must be an object from token ids to numbers")
    if len(value) > MAX_TOKEN_LIST:
        raise FieldError(f"must have at most {MAX_TOKEN_LIST} entries, not {len(value)}")
    biases = {}
    for key, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,10}", key) or int(key) > MAX_TOKEN_ID:
            raise FieldError("is not a token id", key[:100])
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise FieldError("must be a number between -100 and 100", key)
        biases[int(key)] = float(bias)
    return biases


def _parse_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FieldError("must be an object of strings")
    if len(value) > MAX_METADATA:
        raise FieldError(f"must have at most {MAX_METADATA} entries, not {len(value)}")
    return value


def _parse_top_k(value: Any) -> Any:
    return 0 if type(value) is int and value == -1 else value  # vLLM's spelling of "off"


Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


class UsageReports(Enum):
    """With which of a stream's chunks its counts of tokens come."""

    NEVER = auto()
    LAST = auto()
    ALWAYS = auto()


class StreamOptions(Wire):
    refused = unsupported.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with every chunk, what there is up to then

    @model_validator(mode="after")
    def _check_usage(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise FieldError("needs include_usage: true", "continuous_usage_stats")
        return self


class GenerationFields(Wire):
    """The fields that chat and text completions share."""

    model: str | None = None  # None: the model served
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0

    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[Count | None, BeforeValidator(_parse_top_k)] = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[int, float], PlainValidator(_parse_logit_bias)] = Field(default_factory=dict)
    seed: Annotated[int | None, Field(ge=-(2**SEED_BITS), lt=2**SEED_BITS)] = None

    max_tokens: PositiveCount | None = None
    min_tokens: Count = 0
    stop: Annotated[tuple[str, ...], PlainValidator(_parse_stop)] = ()
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_LIST)] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    # Labels for the client's own bookkeeping: they cannot change an answer, so accepting them ignores nothing. The
    # first two say whose share of the service a request takes, where no API key does.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Annotated[dict[str, str], PlainValidator(_parse_metadata)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("needs stream: true", "stream_options")
        return self

    @property
    def usage_reports(self) -> UsageReports:
        options = self.stream_options or StreamOptions()
        if options.continuous_usage_stats:
            return UsageReports.ALWAYS
        return UsageReports.LAST if options.include_usage else UsageReports.NEVER

    def sampling_params(self, defaults: SamplingDefaults, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """What the engine is asked for; any field left out is the model's own default, then the API's.

        Raises:
            InvalidRequest: a value is out of range.
        """

        def chosen(client: float | None, model: float | None, api: float) -> float:
            return client if client is not None else model if model is not None else api

        return SamplingParams(
            temperature=chosen(self.temperature, defaults.temperature, 1.0),
            top_p=chosen(self.top_p, defaults.top_p, 1.0),
            top_k=int(chosen(self.top_k, defaults.top_k, 0)),
            min_p=chosen(self.min_p, defaults.min_p, 0.0),
            repetition_penalty=chosen(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            # OpenAI accepts negative seeds; ours are 63 bits wide. The response reports the one that was used.
            seed=None if self.seed is None else self.seed & (1 << SEED_BITS) - 1,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


def _unsupported_text(harmless: unsupported.Harmless) -> str:
    allowed = f" (only {' or '.join(repr(value) for value in harmless)} is accepted)" if harmless else ""
    return f"is not supported{allowed}"
