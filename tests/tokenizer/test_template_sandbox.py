"""Templates that raise, loop, grow or break: an error for that request, within a second, and nothing else."""

import gc
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.tokenizer import template_worker
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.template_sandbox import TemplateSandbox

GOOD = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
# CPU time of a test: the limit, and three starts of the process. Wall time has room for a busy machine.
MAX_CPU_S = template_worker.CPU_LIMIT_S + 1.0
MAX_WALL_S = template_worker.WALL_LIMIT_S + 30.0  # on a busy machine; else a second or two

GROW = "{%% set n = namespace(x=%s) %%}{%% for i in range(40) %%}{%% set n.x = %s %%}{%% endfor %%}{{ n.x }}"
HOSTILE = {
    "nested_loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "huge_range": "{{ range(10**9) | list | length }}",
    "repeated_text": "{{ 'x' * 10**9 }}",
    "repeated_list": "{{ ([1] * 10**8) | list | length }}",
    "doubled_text": GROW % ("'a'", "n.x ~ n.x"),
    "doubled_list": GROW % ("[1]", "n.x + n.x"),
    "tripled_by_replace": GROW % ("'a'", "n.x.replace('a', 'aaa')"),
    "joined": "{{ (['a'] * 100000) | join('b' * 100000) }}",
    "compared_lists": "{{ ([1] * 10**8) == ([1] * 10**8) }}",
    "printed_lists": "{{ [[1] * 10000] * 10000 }}",
    "lists_to_json": "{{ ([[1] * 10000] * 10000) | tojson }}",
    "json_indent": "{{ [1] | tojson(indent=10**9) }}",
    "padded": "{{ '%1000000000d' | format(3) }}",
    "macro_recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "loop_recursion": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "endless_output": "{% for i in range(100000) %}{{ 'y' * 100000 }}{% endfor %}",
    "indented": "{{ ('a\n' * 10000) | indent(100000) }}",
}
FAULTY = {
    "raises": ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
    "unclosed": ("{% for m in messages %}", "unexpected end"),
    "unknown_tag": ("{% frobnicate %}", "frobnicate"),
    "unknown_filter": ("{{ messages | frobnicate }}", "frobnicate"),
    "unknown_method": ("{{ messages[0].content.frobnicate() }}", "frobnicate"),
    "undefined": ("{{ nothing.at.all }}", "nothing"),
    "types": ("{{ 'a' + 1 }}", "+"),
    "include": ("{% include '/etc/passwd' %}", "passwd"),
    "python": ("{{ messages.__class__.__mro__ }}", "undefined"),
    "deep_expression": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion"),
}


def refuse(template: ChatTemplate, messages: list[dict[str, Any]] = MESSAGES) -> str:
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages)
    assert caught.value.param == "messages"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_template_is_refused_in_time(source: str) -> None:
    gc.collect()  # the processes of other tests end now, and not below
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    template = ChatTemplate({"default": source, "tool_use": GOOD}, {})
    assert template.render(MESSAGES, tools=[]) == "hi"  # the process is there
    start_s = time.monotonic()
    refuse(template)
    assert time.monotonic() - start_s < MAX_WALL_S
    assert template.render(MESSAGES, tools=[]) == "hi"  # and is there again
    del template
    gc.collect()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_CPU_S


# In a process of its own, whose children are these renderers and nobody else's.
MEASURED_RENDERS = """
import resource, sys
from engine.errors import InvalidRequest
from engine.tokenizer.chat_template import ChatTemplate
for source in sys.argv[1:]:
    template = ChatTemplate({"default": source}, {})
    try:
        template.render([{"role": "user", "content": "hi"}])
        raise SystemExit(f"{source} was rendered")
    except InvalidRequest:
        del template
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def test_hostile_templates_take_bounded_memory() -> None:
    sources = [HOSTILE[name] for name in ("repeated_list", "doubled_text", "doubled_list", "lists_to_json", "indented")]
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED_RENDERS, *sources], capture_output=True, text=True, check=True, timeout=280
    )
    assert int(finished.stdout) < template_worker.MEMORY_LIMIT_BYTES


@pytest.mark.parametrize(("source", "reason"), FAULTY.values(), ids=FAULTY)
def test_faulty_template_says_why(source: str, reason: str) -> None:
    assert reason in refuse(ChatTemplate({"default": source}, {}))


def test_a_reason_is_short() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('no: ' ~ messages[0].content) }}"}, {})
    assert refuse(template, [{"role": "user", "content": "long\n" * 100_000}]).endswith("long l…")


def test_an_interrupted_rendering_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = TemplateSandbox({"default": GOOD})
    assert sandbox.render("default", {"messages": MESSAGES}) == "hi"

    def interrupt(_pipe: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("engine.tokenizer.template_sandbox.read_frame", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("default", {"messages": [{"content": "first"}]})
    assert sandbox.render("default", {"messages": [{"content": "second"}]}) == "second"


def test_too_long_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = template_worker.make_environment({"default": "{{ 'x' * 100 }}"})
    request = b'{"template": "default", "variables": {}}'
    assert template_worker.answer(environment, request) == b"=" + b"x" * 100
    monkeypatch.setattr(template_worker, "MAX_RENDERED_BYTES", 99)
    assert template_worker.answer(environment, request).startswith(b"!it writes more than 99")


@pytest.mark.parametrize(
    "value",
    ["a\ud800b", "\udfff", float("nan"), {"k\udc00": 1}, object()],
    ids=["high", "low", "nan", "key", "object"],
)
def test_what_json_cannot_carry_is_refused(value: Any) -> None:
    template = ChatTemplate({"default": GOOD}, {})
    if isinstance(value, float):
        assert template.render([{"role": "user", "content": value}]) == "None"  # JSON has no NaN: it is null there
    else:
        refuse(template, [{"role": "user", "content": value}])
    assert template.render(MESSAGES) == "hi"


def test_long_messages_fit() -> None:
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content | trim }}\n{% endfor %}"}, {})
    messages = [{"role": "user", "content": "word " * 200_000}] * 8
    assert len(template.render(messages)) == 8 * 1_000_000
    assert len(template.render([{"role": "user", "content": "x"}] * 50_000)) == 100_000


def test_threads_take_turns() -> None:
    template = ChatTemplate({"default": GOOD}, {})
    results: dict[int, set[str]] = {}

    def work(index: int) -> None:
        results[index] = {template.render([{"role": "user", "content": f"{index}" * 1000}]) for _ in range(50)}

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: {f"{index}" * 1000} for index in range(4)}


def test_the_process_ends_with_its_owner() -> None:
    sandbox = TemplateSandbox({"default": GOOD})
    assert sandbox._process is None  # none before it is needed
    assert sandbox.render("default", {"messages": MESSAGES}) == "hi"
    process = sandbox._process
    assert process is not None
    assert process.poll() is None
    del sandbox
    gc.collect()
    assert process.poll() == 0


def test_a_killed_process_is_replaced() -> None:
    sandbox = TemplateSandbox({"default": GOOD})
    assert sandbox.render("default", {"messages": MESSAGES}) == "hi"
    assert sandbox._process is not None
    sandbox._process.kill()
    with pytest.raises(InvalidRequest):
        sandbox.render("default", {"messages": MESSAGES})
    assert sandbox.render("default", {"messages": MESSAGES}) == "hi"


def test_the_worker_imports_nothing_of_the_engine() -> None:
    source = Path(template_worker.__file__).read_text()
    assert "from engine" not in source
    assert "import engine" not in source


def test_named_templates() -> None:
    both = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"}, {})
    assert both.render(MESSAGES) == "plain"
    assert both.render(MESSAGES, tools=[]) == "tools"
    only_default = ChatTemplate({"default": "plain"}, {})
    assert only_default.render(MESSAGES, tools=[]) == "plain"
    assert "rag" in refuse(ChatTemplate({"rag": "rag"}, {}))


def test_variables_reach_the_template() -> None:
    source = (
        "{{ bos_token }}{{ documents[0].title }}{{ enable_thinking }}{{ add_generation_prompt }}{{ tools is none }}"
    )
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"})
    rendered = template.render(
        MESSAGES, documents=[{"title": "T"}], add_generation_prompt=False, variables={"enable_thinking": False}
    )
    assert rendered == "<s>TFalseFalseTrue"
    assert template.render(MESSAGES, documents=[{"title": 1}], variables={"bos_token": "B"}).startswith("B1")
