"""Times and peak memory of calls."""

import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from toma_fx.bench.timing import CPU, WALL, Contender, interleaved, recorded, sample


def test_contenders_take_turns_and_first_calls_are_apart() -> None:
    order: list[str] = []
    contenders = [Contender(name=n, run=lambda n=n: order.append(n)) for n in "ab"]  # type: ignore[misc]
    timings = interleaved(contenders, 2)
    assert "".join(order) == "ab" + "abab"
    assert [len(timing.calls) for timing in timings] == [2, 2]
    assert all(timing.first_call is not None for timing in timings)


def test_warm_ups_are_not_counted() -> None:
    calls: list[None] = []
    (timing,) = interleaved([Contender(name="a", run=lambda: calls.append(None), warm_ups=3)], 2)
    assert (len(calls), len(timing.calls)) == (5, 2)


def test_a_failure_is_a_reason_where_it_may_be_and_an_error_elsewhere() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel\nand a long story")

    works = Contender(name="works", run=lambda: None)
    fails = Contender(name="fails", run=fail, optional=True)
    timings = interleaved([fails, works], 2)
    assert timings[0].failure == "RuntimeError: no such kernel"
    assert timings[0].calls == ()
    assert len(timings[1].calls) == 2
    with pytest.raises(RuntimeError, match="no such kernel"):
        interleaved([Contender(name="fails", run=fail)], 1)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_contenders_of_one_function_are_all_compiled(fullgraph: bool) -> None:
    torch._dynamo.reset()
    counter, numbers = CompileCounter(), range(12)  # more than dynamo's own limit of 8

    def contender(number: int) -> Contender:
        def call(tokens: torch.Tensor) -> torch.Tensor:
            return tokens * number

        compiled = torch.compile(call, backend=counter, fullgraph=fullgraph, dynamic=False)
        return Contender(name=str(number), run=lambda: compiled(torch.ones(2)))

    interleaved([contender(number) for number in numbers], 2)
    assert counter.frame_count == len(numbers)


def test_cpu_time_leaves_out_what_others_had() -> None:
    def wait() -> None:
        time.sleep(0.2)

    assert sample(wait, clock=WALL) >= 0.2
    assert sample(wait, clock=CPU) < 0.1
    (timing,) = interleaved([Contender(name="wait", run=wait)], 2, clock=CPU)
    assert max(timing.calls) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_call_is_replayed() -> None:
    total = torch.zeros((), device="cuda")
    calls: list[None] = []

    def add() -> None:
        calls.append(None)
        total.add_(1)

    replay = recorded(add)
    for _ in range(3):
        replay()
    assert len(calls) == 3  # twice as it is, once to record it
    assert total.item() == 2 + 3  # recording runs nothing
