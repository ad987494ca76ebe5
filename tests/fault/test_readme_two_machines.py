"""README's training example on two machines, each a network namespace: the program and the commands as printed.

The first machine has the algorithm, the store and the LLM proxy. The second one has nothing but the runners, and knows
the first one by the name that README uses.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import self_signed
from network import Network, network

pytestmark = pytest.mark.root

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FIRST = "first.machine"
SECONDS = 90


def section(title: str, language: str) -> list[str]:
    """The code blocks of a section of README."""
    _, _, rest = README.partition(f"\n## {title}\n")
    text, _, _ = rest.partition("\n## ")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


[PROGRAM] = section("Train your own agent", "python")
COMMANDS = section("On two machines", "bash")
"""On the machine of the algorithm; on each machine that runs agents."""


@pytest.fixture
def net() -> Iterator[Network]:
    with network(1) as built:
        built.name_server(FIRST)
        yield built


class Machine:
    """A machine with a folder of its own, in which the program lies."""

    def __init__(self, net: Network, client: int | None, folder: Path, program: str = PROGRAM) -> None:
        self._inside = net.inside(client)
        self.folder = folder / ("first" if client is None else f"other-{client}")
        self.folder.mkdir()
        (self.folder / "train.py").write_text(program, encoding="utf-8")

    def begin(self, command: str, **variables: str) -> None:
        """Type a command, in a shell."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "XDG_STATE_HOME": str(self.folder / "state"),
        }
        with (self.folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [*self._inside, "bash", "-c", command],
                cwd=self.folder,
                env=environment | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> tuple[int, str]:
        """Wait until the command has ended; its exit code, and what it wrote."""
        try:
            code = self._process.wait(SECONDS)
        finally:
            self.kill()
        return code, (self.folder / "log").read_text()

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_both(
    net: Network,
    folder: Path,
    program: str = PROGRAM,
    *,
    on_second: str = COMMANDS[1],
    runner_first: bool = False,
    **variables: str,
) -> tuple[tuple[int, str], tuple[int, str]]:
    """README's command on the first machine, and one on the second; how each ended."""
    first, second = Machine(net, None, folder, program), Machine(net, 0, folder, program)
    order = [(first, COMMANDS[0]), (second, on_second)]
    for machine, command in reversed(order) if runner_first else order:
        machine.begin(command, **variables)
    try:
        return first.end(), second.end()
    finally:
        first.kill()
        second.kill()


def check_all_succeeded(told: tuple[int, str]) -> None:
    """Fail unless every rollout succeeded, and each has a recorded call that could be learned from."""
    code, log = told
    assert code == 0, log
    counts = re.findall(r"(\d+) rollouts ended of (\d+) \((\d+) succeeded\)", log)
    assert counts, log
    assert len(set(counts[-1])) == 1, log
    assert int(counts[-1][0]) >= 96, log
    # GRPO says of each step what it could not use: failures, calls that are missing, calls that are unusable.
    assert "step" not in log, log


def test_the_commands_are_those_that_are_run() -> None:
    assert len(COMMANDS) == 2
    assert all("\n" not in command.strip() for command in COMMANDS)
    assert FIRST in COMMANDS[1]


@pytest.mark.parametrize("runner_first", [pytest.param(False, marks=pytest.mark.slow), True])
def test_readme_on_two_machines(runner_first: bool, net: Network, tmp_path: Path) -> None:
    here, there = run_both(net, tmp_path, runner_first=runner_first)
    check_all_succeeded(here)
    assert there[0] == 0, there[1]


def test_the_script_itself_runs_the_agents(net: Network, tmp_path: Path) -> None:
    """As docs/topology.md has it."""
    own = f"AGL_API_KEY=our-secret-key AGL_CURRENT_ROLE=runner AGL_SERVER_HOST={FIRST} python train.py"
    here, there = run_both(net, tmp_path, on_second=own)
    check_all_succeeded(here)
    assert there[0] == 0, there[1]


def test_readme_on_two_machines_with_certificates(net: Network, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path, FIRST, net.server_address)
    program = PROGRAM.replace("    answer = ask(", "    print(llm.endpoint, flush=True)\n    answer = ask(")
    here, there = run_both(
        net,
        tmp_path,
        program,
        on_second=COMMANDS[1].replace("http://", "https://"),
        AGL_TLS_CERTIFICATE=str(certificate),
        AGL_TLS_KEY=str(key),
        AGL_TLS_CA_FILE=str(certificate),
        SSL_CERT_FILE=str(certificate),  # for the agent, whose program calls the proxy by itself
    )
    check_all_succeeded(here)
    assert there[0] == 0, there[1]
    assert f"at https://{FIRST}:4747" in there[1]
    assert f"https://{net.server_address}:" in there[1]
    assert f"http://{net.server_address}:" not in there[1]


def test_a_certificate_that_is_not_trusted_is_refused(net: Network, tmp_path: Path) -> None:
    """The negative control."""
    certificate, key = self_signed(tmp_path, FIRST, net.server_address)
    first, second = Machine(net, None, tmp_path), Machine(net, 0, tmp_path)
    first.begin(COMMANDS[0], AGL_TLS_CERTIFICATE=str(certificate), AGL_TLS_KEY=str(key))
    try:
        second.begin(COMMANDS[1].replace("http://", "https://"))
        code, log = second.end()
        assert code != 0
        assert "is not trusted here" in log
        assert "AGL_TLS_CA_FILE" in log
    finally:
        first.kill()


def test_an_agent_that_does_not_send_the_key_is_seen(net: Network, tmp_path: Path) -> None:
    """The negative control: that the run on two machines goes well is no accident."""
    assert ', "Authorization": f"Bearer {key}"' in PROGRAM
    here, _ = run_both(net, tmp_path, PROGRAM.replace(', "Authorization": f"Bearer {key}"', ""))
    assert here[0] == 1
    assert "HTTPError: HTTP Error 401" in here[1]
    with pytest.raises(AssertionError):
        check_all_succeeded(here)


@pytest.mark.parametrize("runner_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_proxy_that_others_cannot_reach_is_not_handed_out(runner_first: bool, net: Network, tmp_path: Path) -> None:
    program = PROGRAM.replace("agl.LLMProxy()", 'agl.LLMProxy(host="127.0.0.1")')
    assert program != PROGRAM
    here, there = run_both(net, tmp_path, program, runner_first=runner_first)
    for code, log in (here, there):
        assert code != 0, log
        assert "LLMProxy(public_url='http://NAME:PORT')" in log
        assert "rollouts failed" not in log
    assert "refuses runners of this machine" in there[1]
    assert "a runner at 10.77.0.10 is refused" in here[1]
    assert " failed" not in here[1].partition("Traceback")[0], "nothing was handed out"


def test_the_public_url_is_what_agents_get(net: Network, tmp_path: Path) -> None:
    program = PROGRAM.replace("agl.LLMProxy()", f'agl.LLMProxy(public_url="http://{FIRST}:4748")')
    here, there = run_both(net, tmp_path, program)
    check_all_succeeded(here)
    assert there[0] == 0, there[1]


def test_a_policy_without_a_proxy_is_served_where_the_store_is(net: Network, tmp_path: Path) -> None:
    """Agents elsewhere reach it; that it is not recorded without a tracer for it is another matter."""
    program = PROGRAM.replace(", llm_proxy=agl.LLMProxy()", "")
    assert program != PROGRAM
    here, _ = run_both(net, tmp_path, program)
    counts = re.findall(r"(\d+) rollouts ended of (\d+) \((\d+) succeeded\)", here[1])
    assert counts, here[1]
    assert len(set(counts[-1])) == 1, here[1]
    refused = program.replace("n_steps=5", 'n_steps=5, endpoint_host="127.0.0.1"')
    (tmp_path / "again").mkdir()
    here, there = run_both(net, tmp_path / "again", refused)
    assert here[0] != 0
    assert there[0] != 0
    assert "Leave out endpoint_host= of GRPO" in there[1]
