"""What all tests share: coroutine test functions, which pytest does not run by itself, get their own event loop."""

import asyncio
import inspect
import signal
import threading

import pytest


def pytest_configure() -> None:
    """Let Ctrl+C be heard: a shell starts what it runs in the background with SIGINT ignored, also for children."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an ``async def`` test with ``asyncio.run``; leave every other test to pytest.

    A test that is wrapped, as by Hypothesis's ``@given``, is not a coroutine function and stays with pytest.
    """
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True
