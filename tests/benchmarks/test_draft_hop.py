import sys

import pytest

from benchmarks import draft_hop


def test_it_measures_both_transports(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draft_hop", "--rounds", "20", "--requests", "1", "3"])
    draft_hop.main()
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:-2] for row in rows] == [["ipc", "1"], ["ipc", "3"], *(["tcp", "+", "CURVE", n] for n in "13")]
    for row in rows:
        p50, p99 = map(int, row.split()[-2:])
        assert 0 < p50 <= p99
