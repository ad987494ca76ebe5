"""The commands on a real database file: what they find, print, change and refuse."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from agentlightning import LLM, SqliteLightningStore
from agentlightning.cli.terminal import ExitCode
from command_line import agl, agl_process, clean_environment
from worked_store import KEY, RESOURCES, make_database, spans_of_a_turn


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that the tests of this module only read."""
    return make_database(tmp_path_factory.mktemp("worked") / "store.db")


@pytest.fixture
def database(worked: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    copy = tmp_path / "store.db"
    shutil.copyfile(worked, copy)
    return copy


# --- Status ------------------------------------------------------------------------------------------


def test_status_is_one_screen(worked: Path) -> None:
    text = agl("status", "--url", worked).ok().out
    assert "8   1 queuing   1 running   4 succeeded   2 failed" in text
    assert "2 known, and no process has the file open" in text
    assert re.search(r"^2 of 6 +agent_error +ValueError: boom", text, re.M)
    assert "1 rollout in the queue and 1 begun, and no process has this file open" in text
    assert re.search(r"^reward +\S+ on average of the last \d", text, re.M)
    assert len(text.splitlines()) < 30


def test_status_as_json_has_the_same(worked: Path) -> None:
    told = agl("status", "--url", worked, "-o", "json").ok().json
    assert told["rollouts"]["succeeded"] == 4
    assert told["oldest_waiting"]["rollout_id"] == "ro-task-7"
    assert told["failures"] == [{"reason": "agent_error", "count": 2, "newest": "ro-task-5"}]
    assert {each["worker_id"]: each["alive"] for each in told["workers"]} == {"w-1": False, "w-2": False}
    assert "no_owner" in {each["code"] for each in told["findings"]}


def test_status_is_watched_line_by_line_where_there_is_no_terminal(worked: Path) -> None:
    words = [sys.executable, "-m", "agentlightning", "status", "--watch", "--interval", "0.2", "-o", "json"]
    with subprocess.Popen(
        [*words, "--url", str(worked)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()
    ) as watch:
        assert watch.stdout is not None
        lines = [watch.stdout.readline() for _ in range(3)]
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=20)
    assert all(b'"succeeded": 4' in line for line in lines)
    assert (watch.returncode, err) == (ExitCode.INTERRUPTED, b"")


# --- Rollouts ----------------------------------------------------------------------------------------


def ids(*words: object) -> list[str]:
    return [each["rollout_id"] for each in agl("rollouts", "ls", "-o", "json", *words).ok().json["items"]]


def test_rollouts_are_sorted_and_filtered_by_reward(worked: Path) -> None:
    told = agl("rollouts", "ls", "-o", "json", "--url", worked).ok().json["items"]
    rewards = {each["rollout_id"]: each["reward"] for each in told if each["reward"] is not None}
    assert len(set(rewards.values())) > 1
    best = sorted(rewards.values(), reverse=True)
    assert [rewards.get(each) for each in ids("--sort", "reward", "--min-reward", "-100", "--url", worked)] == best
    worst = ids("--sort", "reward", "--oldest-first", "--limit", "1", "--url", worked)
    assert [rewards[each] for each in worst] == best[-1:]
    few = ids("--max-reward", best[-1], "--url", worked)
    assert few
    assert all(rewards[each] == best[-1] for each in few)
    assert re.search(r" reward ", agl("rollouts", "ls", "--url", worked).ok().out)


def test_rollouts_are_listed_the_newest_first(worked: Path) -> None:
    text = agl("rollouts", "ls", "--url", worked).ok().out
    assert text.index("ro-task-7") < text.index("ro-task-0")
    assert "agent_error: ValueError: boom" in text
    assert '{"task": "number 7"}' in text


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["--status", "failed"], [5, 4]),
        (["-s", "queuing", "-s", "running", "--oldest-first"], [6, 7]),
        (["--match", "task-3"], [3]),
        (["--sort", "rollout_id", "--oldest-first", "-n", "2", "--offset", "1"], [1, 2]),
        (["--status", "cancelled"], []),
    ],
)
def test_rollouts_are_filtered_sorted_and_paged(worked: Path, words: list[str], numbers: list[int]) -> None:
    assert ids("--url", worked, *words) == [f"ro-task-{number}" for number in numbers]


def test_what_a_page_leaves_out_is_said_beside_the_output(worked: Path) -> None:
    done = agl("rollouts", "ls", "--url", worked, "-n", "3")
    assert (done.code, done.err) == (0, "3 of 8; more with --limit and --offset\n")
    assert len(done.out.splitlines()) == 4


def test_an_unknown_field_to_sort_by_is_wrong_usage(worked: Path) -> None:
    done = agl("rollouts", "ls", "--url", worked, "--sort", "colour")
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert "colour" in done.err


def test_one_rollout_is_shown_with_its_attempts_spans_and_reward(worked: Path) -> None:
    text = agl("rollouts", "show", "ro-task-4", "--url", worked).ok().out
    for words in ("agent_error: ValueError: boom", "rs-main version 2", "1 attempt", "0.5", "chat policy ×1"):
        assert words in text
    told = agl("rollouts", "show", "ro-task-4", "--url", worked, "-o", "json").ok().json
    [attempt] = told["attempts"]
    assert (attempt["reward"], attempt["spans"], attempt["status"]) == (0.5, 4, "failed")
    assert told["rollout"]["input"] == {"task": "number 4"}


def test_an_attempt_that_did_not_call_its_model_is_told_of(tmp_path: Path) -> None:
    async def make() -> None:
        async with SqliteLightningStore(tmp_path / "store.db") as store:
            model = LLM(endpoint="http://127.0.0.1:8000/v1", model="m")
            await store.add_resources({"llm": model}, resources_id="rs-1")
            for name, spans in (("without", 0), ("with", None)):
                started = await store.start_rollout({}, resources_id="rs-1", rollout_id=f"ro-{name}")
                await store.add_many_spans(spans_of_a_turn(started, 1.0)[:spans])
                await store.update_attempt(started.rollout_id, started.attempt.attempt_id, "succeeded")

    asyncio.run(make())
    shown = agl("rollouts", "show", "ro-without", "--url", tmp_path / "store.db")
    assert (shown.code, "no_model_calls" in shown.out, "recorded call" in shown.err) == (0, True, True)
    for name, is_flagged in (("ro-without", True), ("ro-with", False)):
        told = agl("rollouts", "show", name, "--url", tmp_path / "store.db", "-o", "json").ok().json
        assert [attempt["no_model_calls"] for attempt in told["attempts"]] == [is_flagged]


@pytest.mark.parametrize(
    ("name", "found"), [("latest", "ro-task-7"), ("task-2", "ro-task-2"), ("ro-task-0", "ro-task-0")]
)
def test_a_rollout_is_found_by_what_is_clear_enough(worked: Path, name: str, found: str) -> None:
    assert agl("rollouts", "show", name, "--url", worked, "-o", "json").ok().json["rollout"]["rollout_id"] == found


def test_a_name_that_is_not_clear_or_not_there_is_refused(worked: Path) -> None:
    several = agl("rollouts", "show", "ro-task", "--url", worked)
    assert several.code == ExitCode.USAGE
    assert "is part of 8 ids: ro-task-0" in several.err
    nothing = agl("rollouts", "show", "ro-nobody", "--url", worked)
    assert nothing == (ExitCode.NOT_FOUND, "", "error: there is no rollout 'ro-nobody'; `agl rollouts ls` lists them\n")


def test_rollouts_are_cancelled_all_or_none_of_those_named(database: Path) -> None:
    unknown = agl("rollouts", "cancel", "ro-task-7", "ro-nobody", "--url", database)
    assert unknown.code == ExitCode.NOT_FOUND
    done = agl("rollouts", "cancel", "task-6", "ro-task-7", "-m", "wrong prompt", "--url", database).ok()
    assert done.out == "ro-task-6  cancelled\nro-task-7  cancelled\n"
    assert "cancelled: wrong prompt" in agl("rollouts", "show", "ro-task-7", "--url", database).ok().out
    agl("rollouts", "cancel", "ro-task-7", "--url", database).ok()  # a repeat changes nothing
    ended = agl("rollouts", "cancel", "ro-task-0", "--url", database)
    assert ended.code == ExitCode.FAILED
    assert "succeeded" in ended.err


def test_old_rollouts_are_deleted_when_that_is_wanted(database: Path) -> None:
    asked = agl_process("rollouts", "prune", "--older-than", "0s", "--url", database, stdin=subprocess.DEVNULL)
    assert asked.code == ExitCode.FAILED
    assert "Delete all rollouts" in asked.out + asked.err
    assert agl("rollouts", "prune", "--older-than", "1d", "-y", "--url", database).ok().out == "0 rollouts deleted\n"
    assert agl("rollouts", "prune", "--older-than", "0s", "-y", "--url", database).ok().out == "6 rollouts deleted\n"
    assert ids("--url", database) == ["ro-task-7", "ro-task-6"]
    assert agl("rollouts", "prune", "--older-than", "soon", "-y", "--url", database).code == ExitCode.USAGE
    agl("verify", "--url", database).ok()


# --- Traces ------------------------------------------------------------------------------------------


def test_a_trace_is_a_waterfall(worked: Path) -> None:
    lines = agl("trace", "ro-task-3", "--spans", "--url", worked).ok().out.splitlines()
    assert lines[0].startswith("ro-task-3  attempt 1  succeeded")
    assert lines[0].endswith("4 spans  reward 0.375")
    assert [line.split()[0] for line in lines[1:]] == ["agent", "chat", "tool", "agentlightning.annotation"]
    agent, call, tool = (line.index("█") for line in lines[1:4])
    assert agent < call < tool
    assert lines[2].startswith("  chat policy")
    assert "120 → 33 tokens" in lines[2]
    assert "primary reward 0.375" in lines[4]


def test_a_trace_of_the_newest_that_has_begun(worked: Path) -> None:
    assert agl("trace", "--url", worked).ok().out.startswith("ro-task-6  attempt 1  running")


def test_a_trace_by_attempt_name_and_attribute(worked: Path) -> None:
    text = agl("trace", "ro-task-3", "-a", "1", "--spans", "--name", "tool", "--attributes", "--url", worked).ok().out
    assert "query = x" in text
    assert "chat" not in text
    told = agl("trace", "ro-task-3", "--spans", "-o", "json", "--url", worked).ok().json
    assert [each["sequence_id"] for each in told["items"]] == [1, 2, 3, 4]
    assert agl("trace", "ro-task-3", "--name", "tool", "--url", worked).code == ExitCode.USAGE, "without --spans"
    missing = agl("trace", "ro-task-3", "-a", "2", "--url", worked)
    assert missing.code == ExitCode.NOT_FOUND
    assert "has 1 attempts, and none is '2'" in missing.err
    not_begun = agl("trace", "ro-task-7", "--url", worked)
    assert not_begun.code == ExitCode.NOT_FOUND
    assert "has no attempts yet; it is queuing" in not_begun.err


# --- Workers -----------------------------------------------------------------------------------------


def test_workers_are_listed(worked: Path) -> None:
    text = agl("workers", "ls", "--alive", "--url", worked).ok().out
    assert re.search(r"^w-1 +was busy .* ro-task-6 .*gpu-1", text, re.M)
    told = agl("workers", "ls", "--match", "-2", "-o", "json", "--url", worked).ok().json
    assert [each["worker_id"] for each in told["items"]] == ["w-2"]


def test_workers_are_drained_stopped_and_let_go_on(database: Path) -> None:
    def directives() -> list[str | None]:
        return [each["directive"] for each in agl("workers", "ls", "-o", "json", "--url", database).ok().json["items"]]

    assert agl("workers", "drain", "w-1", "--url", database).ok().out == "w-1  asked to drain, holds ro-task-6\n"
    assert directives() == [None, "drain"]
    agl("workers", "stop", "--all", "--url", database).ok()
    assert directives() == ["stop", "stop"]
    agl("workers", "resume", "w-2", "--url", database).ok()
    assert directives() == [None, "stop"]
    unknown = agl("workers", "drain", "w-1", "w-9", "--url", database)
    assert unknown.code == ExitCode.NOT_FOUND
    assert directives() == [None, "stop"]


def test_waiting_for_workers_ends_when_they_are_free_and_fails_when_they_are_not(database: Path) -> None:
    assert "None of them works any more." in agl("workers", "drain", "w-2", "--wait", "5", "--url", database).ok().out
    busy = agl("workers", "drain", "--all", "--wait", "0", "--url", database)
    assert busy.code == ExitCode.FAILED
    assert busy.err == "After 0 s, still at work: w-1\n"


def test_workers_that_are_long_gone_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def work() -> None:
        async with SqliteLightningStore(path) as store:
            for number in range(3):
                await store.update_worker(f"gone-{number}", lease_seconds=60.0)
                reason = {"message": "its runner has ended", "reason_code": "worker_left"}
                await store.report_worker_lost(f"gone-{number}", **reason)
            await store.update_worker("alive", lease_seconds=60.0)

    asyncio.run(work())
    text = agl("workers", "ls", "--url", path).ok().out
    assert re.search(r"^gone-0 +left .* its runner has ended", text, re.M)
    prune = ("workers", "prune", "--url", path, "--older-than")
    assert "No workers.\n0 workers would be forgotten" in agl(*prune, "1h", "--dry-run").ok().out
    seen = agl(*prune, "0s", "--dry-run").ok().out
    assert seen.endswith("\n3 workers would be forgotten\n")
    assert "alive" not in seen
    assert len(agl("workers", "ls", "--json", "--url", path).ok().json["items"]) == 4, "nothing was done"
    assert agl(*prune, "1h", "-y").ok().out.endswith("Nothing to forget.\n")
    assert agl(*prune, "0s", "-y").ok().out.endswith("\n3 workers forgotten\n")
    (left,) = agl("workers", "ls", "--json", "--url", path).ok().json["items"]
    assert left["worker_id"] == "alive"
    assert agl(*prune, "soon").code == ExitCode.USAGE
    agl("verify", "--url", path).ok()


# --- Resources ---------------------------------------------------------------------------------------


def test_resources_are_listed_shown_and_compared_without_their_keys(worked: Path) -> None:
    commands = (
        ["ls"],
        ["ls", RESOURCES],
        ["show"],
        ["show", RESOURCES, "--version", "1"],
        ["diff", RESOURCES],
        ["ls", "-o", "json"],
        ["show", "-o", "json"],
    )
    texts = [agl("resources", *words, "--url", worked).ok().out for words in commands]
    assert not [text for text in texts if KEY in text]
    assert re.search(r"^rs-main +2 ", texts[0], re.M)
    assert len(texts[1].splitlines()) == 3
    assert "    now\n" in texts[2]
    assert "    please\n" in texts[3]
    assert "-    please\n" in texts[4]
    assert "+    now\n" in texts[4]
    assert KEY in agl("resources", "show", "--show-keys", "--url", worked).ok().out


def test_a_rollback_is_a_new_version_with_old_content(database: Path) -> None:
    done = agl("resources", "rollback", RESOURCES, "1", "--url", database).ok()
    assert done.out == "rs-main: version 3 now has the content of version 1\n"
    assert agl("resources", "diff", RESOURCES, "1", "3", "--url", database).ok().out == "No difference.\n"
    told = agl("resources", "ls", RESOURCES, "-o", "json", "--url", database).ok().json
    assert [each["version"] for each in told["items"]] == [3, 2, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "rs-none"], "there are no resources 'rs-none'"),
        (["ls", "rs-none"], "there are no resources 'rs-none'"),
        (["show", RESOURCES, "--version", "9"], "has versions 1 to 2, not 9"),
        (["diff", RESOURCES, "1", "9"], "has versions 1 to 2, not 9"),
        (["rollback", RESOURCES, "9"], "9"),
    ],
)
def test_unknown_resources_are_exit_code_3(database: Path, words: list[str], message: str) -> None:
    done = agl("resources", *words, "--url", database)
    assert done.code == ExitCode.NOT_FOUND
    assert message in done.err


# --- Verify, backup, restore -------------------------------------------------------------------------


def test_verify_names_what_breaks_a_rule(database: Path) -> None:
    assert "every rule holds (7 attempts, 1 resources, 8 rollouts, 28 spans, 2 workers)" in (
        agl("verify", "--url", database).ok().out
    )
    connection = apsw.Connection(str(database))
    connection.execute("UPDATE rollouts SET status = 'succeeded' WHERE rollout_id = 'ro-task-7'")
    connection.close()
    done = agl("verify", "--url", database)
    assert done.code == ExitCode.VIOLATIONS
    assert "rollout ro-task-7" in done.out
    assert "agl restore" in done.err
    told = agl("verify", "--url", database, "-o", "json")
    assert told.code == ExitCode.VIOLATIONS
    assert any("ro-task-7" in each["record"] for each in told.json["violations"])


def test_a_backup_is_restored_to_the_same(database: Path, tmp_path: Path) -> None:
    backup, restored = tmp_path / "backup.db", tmp_path / "restored.db"
    assert "a whole copy of" in agl("backup", backup, "--url", database).ok().out
    assert "8 rollouts, 28 spans" in agl("restore", backup, restored).ok().out
    for command in (["rollouts", "ls"], ["workers", "ls"], ["resources", "ls", RESOURCES]):
        before, after = (agl(*command, "-o", "json", "--url", each).ok().json for each in (database, restored))
        assert before["items"] == after["items"]


def test_nothing_is_overwritten(database: Path, tmp_path: Path) -> None:
    for words in (["backup", database, "--url", database], ["restore", database, database]):
        done = agl(*words)
        assert done.code == ExitCode.USAGE
        assert "exists already" in done.err
    missing = agl("restore", tmp_path / "none.db", tmp_path / "new.db")
    assert missing.code == ExitCode.USAGE
    assert not (tmp_path / "new.db").exists()


def test_a_broken_database_is_copied_and_told_and_not_restored(database: Path, tmp_path: Path) -> None:
    connection = apsw.Connection(str(database))
    connection.execute("UPDATE rollouts SET status = 'succeeded' WHERE rollout_id = 'ro-task-7'")
    connection.close()
    done = agl("backup", tmp_path / "backup.db", "--url", database)
    assert done.code == ExitCode.VIOLATIONS
    assert "ro-task-7" in done.out
    refused = agl("restore", tmp_path / "backup.db", tmp_path / "restored.db")
    assert refused.code == ExitCode.FAILED
    assert "breaks" in refused.err
    assert "use an older one" in refused.err
    assert not (tmp_path / "restored.db").exists()


# --- In use ------------------------------------------------------------------------------------------


def test_a_file_in_use_is_read_and_not_written(database: Path, tmp_path: Path) -> None:
    """Commands in processes of their own, beside this one, which owns the file."""

    async def run() -> None:
        async with SqliteLightningStore(database) as store:
            await store.enqueue_rollout("new", rollout_id="ro-new")
            shown, drained, copied = await asyncio.gather(
                asyncio.to_thread(agl_process, "rollouts", "show", "ro-new", "--url", database),
                asyncio.to_thread(agl_process, "workers", "drain", "--all", "--url", database),
                asyncio.to_thread(agl_process, "backup", tmp_path / "backup.db", "--url", database),
            )
            assert "queuing" in shown.ok().out
            assert drained.code == ExitCode.UNREACHABLE
            assert f"process {os.getpid()} " in drained.err
            assert "stop it first, or serve the file" in drained.err
            copied.ok()
            assert (await store.get_worker_by_id("w-1")).directive is None  # type: ignore[union-attr]

    asyncio.run(run())
    assert "ro-new" in ids("--url", tmp_path / "backup.db", "-n", "1")


def test_a_pipe_gets_whole_lines_and_no_colours(worked: Path) -> None:
    done = agl_process("rollouts", "ls", "--url", worked, env={"COLUMNS": "40"}).ok()
    assert "\x1b" not in done.out
    assert all(len(line) > 60 for line in done.out.splitlines()[1:])


def test_an_output_that_lacks_characters_gets_others_and_json_whole(worked: Path) -> None:
    narrow = {"PYTHONIOENCODING": "ascii"}
    drawn = agl_process("trace", "ro-task-3", "--spans", "--url", worked, env=narrow).ok()
    assert "chat policy" in drawn.out
    assert drawn.out.isascii()
    hidden = agl_process("resources", "show", "-o", "json", "--url", worked, env=narrow).ok()
    assert hidden.out.isascii()
    assert hidden.json["resources"]["llm"]["api_key"] == "••••"
