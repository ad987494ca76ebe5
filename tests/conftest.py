"""What all tests share: coroutine test functions, which pytest does not run by itself, get their own event loop."""

import asyncio
import inspect
import os
import signal
import tempfile
import threading
from pathlib import Path

import certifi
import pytest

_state_folder = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl+C be heard, keep bytecode, and keep spools out of the home of whoever runs the tests."""
    # Hundreds of new interpreters import the package: each would compile it again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # What a shell starts in the background has SIGINT ignored, and under nohup SIGHUP; so have its children.
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, usual)
    if not hasattr(config, "workerinput"):  # a worker of xdist has what the first process set
        folder = config.stash[_state_folder] = tempfile.TemporaryDirectory(
            prefix="agl-tests-", ignore_cleanup_errors=True
        )
        os.environ["XDG_STATE_HOME"] = folder.name  # and not AGL_SPOOL_DIR, which many tests take from their children
        os.environ.pop("AGL_SPOOL_DIR", None)
        _trust_one_authority(Path(folder.name, "authority.pem"))


def _trust_one_authority(file: Path) -> None:
    """Let OpenSSL read one certificate: all of them take it 60 ms in each interpreter, and no test needs any."""
    first, end, _ = certifi.contents().partition("-----END CERTIFICATE-----\n")
    file.write_text(first + end, encoding="utf-8")
    os.environ["SSL_CERT_FILE"] = str(file)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the spools."""
    folder = config.stash.get(_state_folder, None)
    if folder is not None:
        folder.cleanup()


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
