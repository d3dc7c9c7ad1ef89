"""Helper threads of a plain step: what is shared comes back in order, errors too, in forks and in other threads."""

import multiprocessing
import threading
from functools import partial

import pytest
import torch

from miniawq.compiled.sharing import hand_out, shared_step
from miniawq.hardware import threads


def numbers(count):
    """Through helpers, whichever of them is awake."""
    return [int(found) for found in hand_out([partial(torch.tensor, number) for number in range(count)])]


def meeting(seen, barrier):
    """A task that ends when all that meet have begun."""
    barrier.wait(60)
    seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_inference_mode_enabled()))
    return torch.ones(1)


def test_tasks_meet_in_as_many_threads_as_torch_had():
    with threads(3):
        for _ in range(2):
            seen, barrier = [], threading.Barrier(3)
            with shared_step(), torch.inference_mode():
                hand_out([partial(meeting, seen, barrier)] * 3)
            assert len({thread for thread, *_ in seen}) == 3
            assert {(count, mode) for _, count, mode in seen} == {(1, True)}
        assert torch.get_num_threads() == 3
    helpers = [thread for thread in threading.enumerate() if thread.name == "miniawq helper"]
    assert all(thread.daemon for thread in helpers)


def test_one_thread_or_none_asked_for_shares_nothing():
    """Outside a shared step the library's threads are left as they are."""
    with threads(3):
        seen = []
        hand_out([partial(meeting, seen, threading.Barrier(1))] * 3)
        assert {thread for thread, *_ in seen} == {threading.get_ident()}
        assert {count for _, count, _ in seen} == {3}
    with threads(1), shared_step():
        seen = []
        hand_out([partial(meeting, seen, threading.Barrier(1))] * 3)
        assert {thread for thread, *_ in seen} == {threading.get_ident()}


def test_results_come_in_the_order_of_their_tasks():
    with threads(4), shared_step():
        assert [numbers(count) for count in (0, 1, 2, 50)] == [list(range(count)) for count in (0, 1, 2, 50)]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_reaches_the_caller_and_the_helpers_live_on(failing):
    def fail(barrier):
        barrier.wait(60)
        raise ZeroDivisionError("in a task")

    barrier = threading.Barrier(3)
    tasks = [partial(meeting, [], barrier)] * 3
    tasks[failing] = partial(fail, barrier)
    with threads(3):
        with pytest.raises(ZeroDivisionError, match="in a task"), shared_step():
            hand_out(tasks)
        assert torch.get_num_threads() == 3
        with shared_step():
            hand_out([partial(meeting, [], threading.Barrier(3))] * 3)


def in_a_child(answers):
    with threads(3), shared_step():
        hand_out([partial(meeting, [], threading.Barrier(3))] * 3)
    answers.put(numbers(5))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_gets_helpers_of_its_own():
    with threads(3), shared_step():
        numbers(5)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=in_a_child, args=(answers,), daemon=True)
    child.start()
    assert answers.get(timeout=60) == list(range(5))
    child.join(60)
    assert child.exitcode == 0


def test_several_threads_share_at_the_same_time():
    found = []

    def run():
        with threads(2), shared_step():
            found.append([numbers(20) for _ in range(20)])

    running = [threading.Thread(target=run) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert found == [[list(range(20))] * 20] * 3
