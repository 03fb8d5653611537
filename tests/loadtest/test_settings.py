"""Options that cannot be meant are refused in one line."""

import argparse

import pytest

from loadtest.settings import add_options, read_options


class Parser(argparse.ArgumentParser):
    """As Locust's, as far as these options go."""

    def add_argument(self, *names, env_var=None, is_secret=False, **kwargs):  # type: ignore[no-untyped-def,override]
        del env_var, is_secret
        return super().add_argument(*names, **kwargs)


def parse(*arguments: str) -> argparse.Namespace:
    parser = Parser()
    add_options(parser)  # type: ignore[arg-type]
    return parser.parse_args(arguments)


def test_defaults_and_some_values() -> None:
    settings = read_options(parse())
    assert (settings.arrivals, settings.repeats, settings.limits.output) == ("closed", 3, None)
    settings = read_options(parse("--output-tokens", "9", "--slo", "ttft_s=0.5", "--extra-body", '{"top_k": 3}'))
    assert (settings.limits.output, settings.extra_body) == (9, {"top_k": 3})
    assert settings.row()["objectives"] == {"ttft_s": 0.5}
    assert "api_key" not in settings.row()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slo", "ttft=1"), "no objective 'ttft'"),
        (("--assert", "goodput"), "not an assertion"),
        (("--assert", "ttft<1"), r"nothing measured is called 'ttft'; there are ttft_s\.mean, "),
        (("--extra-body", "[1]"), "not a JSON object"),
        (("--extra-body", "{"), "not JSON"),
        (("--rate", "0"), "rate must be more than 0"),
        (("--repeats", "0"), "repeats must be more than 0"),
        (("--warm-up", "-1"), "warm_up_s must not be negative"),
        (("--output-tokens", "-1"), "numbers of tokens must not be negative"),
    ],
)
def test_wrong_values(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(parse(*arguments))
