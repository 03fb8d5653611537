from serve_app.circuit_breaker import CircuitBreaker


def test_waits_until_several_misses_in_a_row() -> None:
    breaker = CircuitBreaker(max_misses=3, min_pause_s=1.0)
    for now_s in (1.0, 2.0):
        breaker.on_miss(now_s)
        assert breaker.may_wait(now_s)
    breaker.on_answer()
    for now_s in (3.0, 4.0):
        breaker.on_miss(now_s)
        assert breaker.may_wait(now_s)
    breaker.on_miss(5.0)
    assert not breaker.may_wait(5.0)
    assert not breaker.may_wait(5.99)
    assert breaker.may_wait(6.0)


def test_each_failed_try_doubles_the_pause() -> None:
    breaker = CircuitBreaker(max_misses=1, min_pause_s=1.0, max_pause_s=3.0)
    now_s = 10.0
    for pause_s in (1.0, 2.0, 3.0, 3.0):
        breaker.on_miss(now_s)
        assert not breaker.may_wait(now_s + pause_s - 0.01)
        now_s += pause_s
        assert breaker.may_wait(now_s)


def test_an_answer_ends_it() -> None:
    breaker = CircuitBreaker(max_misses=2, min_pause_s=1.0)
    breaker.on_miss(0.0)
    breaker.on_miss(0.0)
    assert breaker.may_wait(1.0)
    breaker.on_answer()
    breaker.on_miss(1.0)
    assert breaker.may_wait(1.0)
    breaker.on_miss(1.0)
    assert not breaker.may_wait(1.99)
    assert breaker.may_wait(2.0)  # the first pause again
