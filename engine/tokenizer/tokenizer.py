"""Text to token ids and back, with the special tokens and the chat template that came with the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.detokenizer import ByteDetokenizer, IncrementalDetokenizer, WindowedDetokenizer
from engine.tokenizer.parts import TokenizerParts
from engine.tokenizer.token_table import make_token_table


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads.

    Decoding never cleans up spaces before punctuation, whatever `clean_up_tokenization_spaces` says: that would change
    text already streamed.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self.bos_token_id: int | None = parts.bos_token_id
        self.eos_token_ids: tuple[int, ...] = parts.eos_token_ids
        self._special_ids = frozenset(
            token_id for token_id, token in parts.backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = max(parts.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._table = make_token_table(parts.backend)
        self._visible_bytes: tuple[bytes, ...] = ()  # the table with special tokens blanked
        if self._table is not None:
            self._visible_bytes = tuple(
                b"" if token_id in self._special_ids else data for token_id, data in enumerate(self._table.token_bytes)
            )
        self._chat_template = ChatTemplate(parts.chat_templates, parts.special_tokens) if parts.chat_templates else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds what the model expects around a text (often its BOS).

        Text that spells a special token becomes that token, as in Transformers.

        Raises:
            InvalidRequest: (param "prompt") `text` holds a lone surrogate.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text: one call into the library, in parallel and without the GIL."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            for text in texts:
                _check_encodable(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all `ids`; bytes that are no character become U+FFFD."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.finish()

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> IncrementalDetokenizer:
        """A detokenizer for one sequence.

        `continues_text`: the ids follow other text (a completion and its prompt), so that the space before their first
        word is kept where a beginning would lose it.
        """
        if self._table is None:
            preceding = self._any_text_token() if continues_text else []
            return WindowedDetokenizer(self._backend, skip_special_tokens, preceding)
        token_bytes = self._visible_bytes if skip_special_tokens else self._table.token_bytes
        return ByteDetokenizer(token_bytes, 0 if continues_text else self._table.num_leading_spaces)

    def _any_text_token(self) -> list[int]:
        """One token with text, to stand before a sequence."""
        ids = (token_id for token_id in range(self.vocab_size) if self._backend.decode([token_id]).strip())
        return [next(ids)]

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model and is no text."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token as in the middle of a text; empty for an id that no token has."""
        if self._table is None:
            text: str = self._backend.decode([token_id], skip_special_tokens=False)
            return text.encode("utf-8")
        return self._table.token_bytes[token_id] if token_id < len(self._table.token_bytes) else b""

    def token_text(self, token_id: int) -> str:
        r"""The text of one token for lists of log-probabilities; a part of a character as `bytes:\xe2\x80`."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that the model's chat template makes of `messages`, as `apply_chat_template` of Transformers.

        It holds the special tokens already: encode it with `add_special_tokens=False`. A special token spelled in a
        message is not escaped and becomes that token, as in Transformers. `variables` are further ones for the
        template, e.g. `enable_thinking`.

        Raises:
            InvalidRequest: (param "messages") there is no template; it refuses the messages; it is malformed or does
                not end within a second or 768 MiB; or a message holds a lone surrogate.
        """
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables=variables,
        )


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X}"
        raise InvalidRequest(
            f"prompt: holds the lone surrogate {surrogate} at character {error.start}", "prompt"
        ) from None
