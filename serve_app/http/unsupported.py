"""Fields that clients of the OpenAI API and of vLLM send and that this service does not honour yet.

Each is refused with its name, except with a value that asks for what happens anyway. Labels that cannot change an
answer (`user`, `safety_identifier`, `prompt_cache_key`, `metadata`) are accepted and are not in these tables.
"""

from collections.abc import Mapping
from typing import Any

Harmless = tuple[Any, ...]  # values that mean "as you do anyway"; null always does

_EXTENSIONS: Mapping[str, Harmless] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

CHAT: Mapping[str, Harmless] = {
    **_EXTENSIONS,
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": (),
    "verbosity": (),
    "web_search_options": (),
}

COMPLETIONS: Mapping[str, Harmless] = {
    **_EXTENSIONS,
    "response_format": ({"type": "text"},),
    "suffix": (),
}

MESSAGE: Mapping[str, Harmless] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "prefix": (False,),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}

STREAM_OPTIONS: Mapping[str, Harmless] = {
    "include_obfuscation": (False,),  # random padding against eavesdroppers on unencrypted networks
}
