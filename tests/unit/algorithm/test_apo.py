"""`APO` against an offline endpoint in OpenAI's shape, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from agentlightning.algorithm.apo import APO, read_prompt
from agentlightning.algorithm.run import Run
from agentlightning.errors import InvalidValue, MissingExtra, NothingToLearn
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import AttemptedRollout, PromptTemplate
from scenes import finish, llm, span_of

TASKS = ["a", "b", "c"]
FIRST = PromptTemplate(template="Answer {question}", engine="f-string")


class Author:
    """A model in OpenAI's shape: its critiques ask for one more "please", its edits add one, up to ``most``."""

    def __init__(self, most: int = 100) -> None:
        self._most = most
        self.asked: list[dict[str, Any]] = []
        self.refuses: Callable[[int], bool] = lambda _: False
        """Whether the call of this number, counted from 1, is answered with an error."""
        self.edits: Callable[[str], str] = self._one_please_more

    async def __aenter__(self) -> Author:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        self.client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        if self.refuses(len(self.asked)):
            return web.json_response({"error": {"message": "slow down"}}, status=429)
        question = body["messages"][0]["content"]
        answer = "It is not polite enough." if body["model"] == "critic" else self.edits(question)
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        )

    def _one_please_more(self, question: str) -> str:
        found = re.search(r"<template>\n(.*?)\n</template>", question, re.DOTALL)
        assert found is not None
        template = found.group(1)
        if template.count("please") < self._most:
            template += " please"
        return f"Here it is:\n<prompt>\n{template}\n</prompt>"


@asynccontextmanager
async def agent(
    store: LightningStore,
    fails: Callable[[AttemptedRollout], bool] = lambda _: False,
    reward_of: Callable[[str], float | None] = lambda said: float(said.count("please")),
    on_defaults: Callable[[str], bool] = lambda _: False,
) -> AsyncIterator[list[str]]:
    """Runs rollouts: the more often the prompt says "please", the higher the reward. Yields the ids that it ran.

    Args:
        store: where they are.
        fails: which fail at once.
        reward_of: the reward for a prompt that was filled in; None: the rollout fails.
        on_defaults: which prompts its runner cannot get; it runs, with another one, and says so.
    """
    ran: list[str] = []

    async def work() -> None:
        while True:
            attempted = await store.dequeue_rollout(wait_seconds=20)
            if attempted is None:
                continue
            ran.append(attempted.rollout_id)
            if fails(attempted):
                await finish(store, attempted, "failed")
                continue
            assert attempted.resources_id is not None
            resources = await store.get_resources_by_id(attempted.resources_id)
            assert resources is not None
            prompt = resources.resources["prompt"]
            assert isinstance(prompt, PromptTemplate)
            try:
                said = prompt.format(question=attempted.input)
            except InvalidValue:
                await finish(store, attempted, "failed")  # as a runner does
                continue
            call = {
                "gen_ai.prompt.0.role": "user",
                "gen_ai.prompt.0.content": said,
                "gen_ai.completion.0.content": "ok",
            }
            await store.add_span(span_of(attempted, name="openai.chat", attributes=call))
            if on_defaults(said):
                mark = {"agentlightning.default_resources": "the server was away"}
                await store.add_span(span_of(attempted, name="agentlightning.annotation", attributes=mark))
            value = reward_of(said)
            if value is not None:
                reward = {"agentlightning.reward.0.value": value}
                await store.add_span(span_of(attempted, name="agentlightning.annotation", attributes=reward))
            await finish(store, attempted, "failed" if value is None else "succeeded")

    task = asyncio.create_task(work())
    try:
        yield ran
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def apo(author: Author, store: LightningStore, **settings: Any) -> APO:
    small = {"beam_width": 2, "branch_factor": 2, "beam_rounds": 2, "gradient_batch_size": 2, "val_batch_size": 2}
    algorithm = APO(
        author.client,
        gradient_model="critic",
        apply_edit_model="editor",
        **{**small, **settings},
    )
    algorithm.set_store(store)
    algorithm.set_initial_resources({"prompt": FIRST, "llm": llm()})
    return algorithm


async def test_prompts_get_better_round_by_round() -> None:
    told: list[tuple[int, dict[str, float]]] = []
    async with Author() as author, InMemoryLightningStore() as store, agent(store):
        algorithm = apo(author, store)
        algorithm.set_reporter(lambda step, numbers: told.append((step, numbers)))
        with pytest.raises(InvalidValue, match="no prompt has been measured"):
            algorithm.get_best_prompt()
        await algorithm.run(TASKS, TASKS)
        latest = await store.get_latest_resources()
    best = algorithm.get_best_prompt()
    assert best.template == "Answer {question} please please"
    assert latest is not None
    assert latest.resources == {"prompt": best, "llm": llm()}
    assert [(step, numbers["reward_mean"]) for step, numbers in told] == [(0, 1.0), (1, 2.0)]


async def test_the_models_are_told_what_came_of_the_prompt() -> None:
    async with Author() as author, InMemoryLightningStore() as store, agent(store, lambda each: each.input == "b"):
        await apo(author, store, beam_rounds=1, diversity_temperature=0.5, gradient_batch_size=3).run(TASKS, TASKS)
    critique = next(body for body in author.asked if body["model"] == "critic")
    edit = next(body for body in author.asked if body["model"] == "editor")
    question = critique["messages"][0]["content"]
    assert critique["temperature"] == 0.5
    assert "<template>\nAnswer {question}\n</template>" in question
    assert 'reward="0" outcome="succeeded"' in question
    assert 'reward="none" outcome="failed' in question, "a failure is no reward of 0"
    assert '"content": "Answer a"' in question
    assert "It is not polite enough." in edit["messages"][0]["content"]


@pytest.mark.parametrize(
    ("shift", "failure_reward", "score"),
    [(0, None, 2 / 3), (-5, None, (-4 - 4 - 5) / 3), (0, -1.0, 1 / 3), (0, 1.0, 1.0)],
    ids=["0 is the worst", "the lowest that was seen", "worse than all", "not bad"],
)
async def test_a_failed_rollout_counts_as_the_worst(shift: float, failure_reward: float | None, score: float) -> None:
    def fails(attempted: AttemptedRollout) -> bool:
        return attempted.mode == "val" and attempted.input == "a"

    def reward_of(said: str) -> float:
        return said.count("please") + shift

    async with Author(most=1) as author, InMemoryLightningStore() as store, agent(store, fails, reward_of):
        told: list[dict[str, float]] = []
        algorithm = apo(author, store, beam_rounds=1, val_batch_size=3, failure_reward=failure_reward)
        algorithm.set_reporter(lambda _, numbers: told.append(numbers))
        await algorithm.run(TASKS, TASKS)
    (numbers,) = told
    assert numbers["reward_mean"] == numbers["best_score"] == pytest.approx(score)
    assert (numbers["failures"], numbers["best_failures"]) == (1, 1), "of the new prompt, which both branches found"
    assert algorithm.get_best_score() == pytest.approx(score)


@pytest.mark.parametrize(("width", "wins"), [(2000, False), (20, True)], ids=["out of bounds", "within"])
async def test_a_prompt_that_takes_too_much_counts_as_failed(width: int, wins: bool) -> None:
    wide = f"Answer {{question:>{width}}} please please"
    async with Author() as author, InMemoryLightningStore() as store, agent(store):
        author.edits = lambda _: f"<prompt>{wide}</prompt>"
        algorithm = apo(author, store, beam_rounds=1)
        told: list[dict[str, float]] = []
        algorithm.set_reporter(lambda _, numbers: told.append(numbers))
        await algorithm.run(TASKS, TASKS)
    assert (algorithm.get_best_prompt().template == wide) is wins
    assert told[0]["failures"] == (0 if wins else 2)


@pytest.mark.parametrize("marked", [False, True])
async def test_rewards_of_default_resources_are_not_the_prompts(marked: bool) -> None:
    """Neither its gain nor its loss, and its critic does not see them."""

    def without_it(said: str) -> bool:
        return marked and ("please" in said or "c" in said)

    async with Author() as author, InMemoryLightningStore() as store, agent(store, on_defaults=without_it):
        algorithm = apo(author, store, beam_rounds=1, val_batch_size=3, gradient_batch_size=3)
        told: list[dict[str, float]] = []
        algorithm.set_reporter(lambda _, numbers: told.append(numbers))
        await algorithm.run(TASKS, TASKS)
    assert algorithm.get_best_prompt().template == ("Answer {question}" if marked else "Answer {question} please")
    assert (told[0]["on_defaults"], told[0]["failures"]) == (3 if marked else 0, 0)
    critique = next(body for body in author.asked if body["model"] == "critic")["messages"][0]["content"]
    assert ("Answer c" in critique) is not marked


async def test_a_prompt_that_a_model_wrote_is_read_and_not_run() -> None:
    like = PromptTemplate(template="{{ question }}", engine="jinja")
    assert read_prompt("{{ question }}{{ 'x' * 9999999 }}{{ 2 ** 99 }}", like).template
    with pytest.raises(InvalidValue, match="takes more than 1000000 steps"):
        read_prompt("{{ question }}" * 7000, like)


async def test_a_prompt_that_makes_the_agent_crash_does_not_win() -> None:
    def reward_of(said: str) -> float | None:
        if "fragile" in said:
            return 1.0 if "task 0" in said else None
        return 0.9 if "solid" in said else 0.4

    words = itertools.cycle(["fragile", "solid"])
    tasks = [f"task {number}" for number in range(8)]
    async with Author() as author, InMemoryLightningStore() as store, agent(store, reward_of=reward_of):
        author.edits = lambda _: f"Answer {{question}} {next(words)}"
        algorithm = apo(author, store, beam_rounds=1, branch_factor=6, val_batch_size=8)
        await algorithm.run(tasks, tasks)
    assert algorithm.get_best_prompt().template == "Answer {question} solid"
    assert algorithm.get_best_score() == pytest.approx(0.9)


async def test_the_score_that_is_claimed_is_that_of_the_whole_validation_set() -> None:
    """Prompts that are all worth the same: the one that is best on a few tasks is lucky there."""

    def luck(said: str) -> float:
        return random.Random(said).random()

    tasks, number = [f"t{number}" for number in range(12)], itertools.count()
    async with Author() as author, InMemoryLightningStore() as store, agent(store, reward_of=luck):
        author.edits = lambda _: f"Answer {{question}} variant {next(number)}"
        told: list[dict[str, float]] = []
        algorithm = apo(author, store, branch_factor=4)
        algorithm.set_reporter(lambda _, numbers: told.append(numbers))
        await algorithm.run(TASKS, tasks)
    best = algorithm.get_best_prompt()
    everywhere = [luck(best.format(question=task)) for task in tasks]
    assert algorithm.get_best_score() == told[-1]["best_score"] == pytest.approx(sum(everywhere) / len(tasks))
    assert told[-1]["reward_mean"] > told[-1]["best_score"], "the negative control: what it was chosen for"


# --- Models that do not answer, and the budget ---


async def test_a_model_that_does_not_answer_costs_one_prompt(caplog: pytest.LogCaptureFixture) -> None:
    async with Author() as author, InMemoryLightningStore() as store, agent(store):
        author.refuses = lambda number: number == 2
        algorithm = apo(author, store)
        await algorithm.run(TASKS, TASKS)
    assert algorithm.get_best_prompt().template == "Answer {question} please please"
    assert caplog.text.count("slow down") == 1


async def test_if_no_model_ever_answers_nothing_was_learned() -> None:
    async with Author() as author, InMemoryLightningStore() as store, agent(store):
        author.refuses = lambda _: True
        algorithm = apo(author, store)
        with pytest.raises(NothingToLearn, match=r"no model answered, .* RateLimitError: .*slow down"):
            await algorithm.run(TASKS, TASKS)
    assert algorithm.get_best_prompt() == FIRST


@pytest.mark.parametrize(("max_calls", "asked"), [(0, 0), (5, 4), (7, 6), (None, 2 * (2 + 4))])
async def test_models_are_not_asked_more_often_than_allowed(max_calls: int | None, asked: int) -> None:
    async with Author() as author, InMemoryLightningStore() as store, agent(store):
        told: list[dict[str, float]] = []
        algorithm = apo(author, store, max_calls=max_calls)
        algorithm.set_reporter(lambda _, numbers: told.append(numbers))
        await algorithm.run(TASKS, TASKS)
    assert len(author.asked) == asked == told[-1]["llm_calls"]
    assert algorithm.get_best_prompt().template.count("please") == (0 if max_calls == 0 else 1 if max_calls == 5 else 2)


async def test_rollouts_that_are_late_are_cancelled() -> None:
    async with Author() as author, InMemoryLightningStore() as store:
        algorithm = apo(author, store, rollout_batch_timeout=0.05, beam_rounds=1, branch_factor=1)
        with pytest.raises(NothingToLearn, match="no rollout of any prompt"):
            await algorithm.run(TASKS, TASKS)
        assert {rollout.status for rollout in await store.query_rollouts()} == {"cancelled"}


async def test_answers_that_are_no_prompt_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    async with Author() as author, InMemoryLightningStore() as store, agent(store):
        author.edits = lambda _: "<prompt>Answer {invented}</prompt>"
        algorithm = apo(author, store, beam_rounds=1)
        await algorithm.run(TASKS, TASKS)
    assert algorithm.get_best_prompt() == FIRST
    assert "uses invented" in caplog.text


async def test_a_search_that_was_cut_off_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    async with Author() as author, InMemoryLightningStore() as store:
        first = apo(author, store)
        first.set_run(Run("search", tmp_path))
        cut = asyncio.Event()
        finished: list[str] = []

        def count(attempted: AttemptedRollout) -> bool:
            finished.append(attempted.rollout_id)
            if len(finished) == 16:  # in the second round
                cut.set()
            return False

        async with agent(store, count):
            running = asyncio.create_task(first.run(TASKS, TASKS))
            await cut.wait()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
        for held in await store.query_rollouts(status_in=["preparing", "running"]):
            await store.update_rollout(held.rollout_id, status="requeuing")
        second = apo(author, store)
        second.set_run(Run("search", tmp_path))
        done = {each.rollout_id for each in await store.query_rollouts(status_in=["succeeded"])}
        async with agent(store) as ran:
            await second.run(TASKS, TASKS)
    assert len(done) >= 14
    assert not done & set(ran)
    assert second.get_best_prompt().template.count("please") == 2


async def test_what_it_needs_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Author() as author, InMemoryLightningStore() as store:
        algorithm = apo(author, store)
        with pytest.raises(InvalidValue, match="both datasets"):
            await algorithm.run(TASKS)
        algorithm.set_initial_resources({"llm": llm()})
        with pytest.raises(InvalidValue, match="one prompt template"):
            await algorithm.run(TASKS, TASKS)
        for name in ("beam_width", "branch_factor", "beam_rounds", "gradient_batch_size", "val_batch_size"):
            zero: dict[str, Any] = {name: 0}
            with pytest.raises(InvalidValue, match=name):
                APO(None, **zero)
        with pytest.raises(InvalidValue, match="rollout_batch_timeout"):
            APO(None, rollout_batch_timeout=0)
        refused: list[dict[str, Any]] = [{"max_calls": -1}, {"failure_reward": float("nan")}]
        for wrong in refused:
            with pytest.raises(InvalidValue, match=next(iter(wrong))):
                APO(None, **wrong)
        without = APO()
        without.set_store(store)
        without.set_initial_resources({"prompt": FIRST})
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(MissingExtra, match=r"agentlightning\[openai\]"):
            await without.run(TASKS, TASKS)


def test_prompts_are_read_out_of_replies() -> None:
    for reply in (
        "Say {question}",
        "Sure!\n<prompt>\nSay {question}\n</prompt> Good luck.",
        "```text\nSay {question}\n```",
    ):
        assert read_prompt(reply, FIRST).template == "Say {question}"
    for reply in ("", "<prompt></prompt>", "Say {question", "Say {other}"):
        with pytest.raises(InvalidValue):
            read_prompt(reply, FIRST)
    jinja = PromptTemplate(template="{% for x in items %}{{ x }}{% endfor %}", engine="jinja")
    assert jinja.placeholders() == {"items"}
    assert read_prompt("{{ items | join }}", jinja).engine == "jinja"
    with pytest.raises(InvalidValue, match="malformed"):
        read_prompt("{% for %}", jinja)
    assert PromptTemplate(template="<poml/>", engine="poml").placeholders() is None
