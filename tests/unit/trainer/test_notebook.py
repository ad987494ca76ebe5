"""Blocking work beside a running event loop, and Ctrl+C meanwhile."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from agentlightning.trainer.trainer import loop_is_running, run_beside_loop

PATIENCE_SECONDS = 10.0


async def test_inside_a_loop_work_is_done_in_another_thread() -> None:
    assert loop_is_running()
    assert run_beside_loop(loop_is_running, pytest.fail) is False


def test_outside_there_is_no_loop() -> None:
    assert not loop_is_running()


def test_what_the_work_raises_comes_out() -> None:
    def work() -> None:
        raise LookupError("not here")

    with pytest.raises(LookupError, match="not here"):
        run_beside_loop(work, pytest.fail)


def test_an_interrupt_is_passed_on_and_the_end_is_waited_for() -> None:
    begun, stop = threading.Event(), threading.Event()
    ended: list[bool] = []

    def work() -> None:
        begun.set()
        ended.append(stop.wait(PATIENCE_SECONDS))

    def press_ctrl_c() -> None:
        begun.wait(PATIENCE_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press_ctrl_c)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        run_beside_loop(work, stop.set)
    pressing.join()
    assert ended == [True]
