"""`APO`: automatic prompt optimisation by textual gradients and beam search.

Source: Pryzant et al., Automatic Prompt Optimization with "Gradient Descent" and Beam Search, 2023,
https://arxiv.org/abs/2305.03495. A model reads how runs with a prompt went and criticises the prompt (the gradient),
another model rewrites it accordingly (the step), and the best prompts are kept for the next round (the beam).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from agentlightning.adapter.adapters import TraceToMessages
from agentlightning.algorithm.base import Algorithm
from agentlightning.algorithm.batches import (
    EndedRollout,
    check_counts,
    check_datasets,
    check_seconds,
    enqueue_inputs,
    wait_for_ends,
)
from agentlightning.algorithm.beam import ScoredPrompt, SearchState, score_of
from agentlightning.errors import InvalidValue, MissingExtra, NothingToLearn
from agentlightning.types import Dataset, PromptTemplate, RolloutMode

_logger = logging.getLogger(__name__)


class APO(Algorithm):
    """Improves the one prompt template among the initial resources.

    In each round every prompt of the beam is run on some training tasks, criticised, and rewritten, ``branch_factor``
    times. Then all prompts are run on the same validation tasks, and those with the highest mean reward are the next
    beam. The mean is over all tasks: a rollout that failed, was late or has no reward counts as ``failure_reward``, so
    that a prompt cannot win by failing on what is difficult.

    The prompt that is best in the end has been chosen for its score, which is therefore too high. It is run again on
    the whole validation dataset, and `get_best_score` is that mean.

    A model that does not answer costs one new prompt, not the run.

    If the run has a name, the search is saved after each stage, and finished rollouts are not run again.

    Args:
        async_openai_client: an ``openai.AsyncOpenAI``, or an object with its methods. None: one is made, which needs
            the extra ``openai`` and takes its key and URL from the environment.
        gradient_model: criticises a prompt.
        apply_edit_model: rewrites it.
        diversity_temperature: of both models.
        gradient_batch_size: number of training tasks behind one critique.
        val_batch_size: number of validation tasks that prompts are compared on; of a smaller dataset all.
        beam_width: number of prompts that are kept.
        branch_factor: number of new prompts from each of them in a round.
        beam_rounds: number of rounds.
        rollout_batch_timeout: seconds to wait for one batch of rollouts; late ones are cancelled.
        failure_reward: what a rollout without a reward counts as. None: the lowest reward seen so far, at most 0.
        max_calls: how often models may be asked in all; a new prompt takes two calls. None: without limit.
        run_initial_validation: whether the first prompt is measured before the first round. If not, it is
            measured with the prompts of the first round.
        seed: of the choice of tasks.

    Raises:
        InvalidValue: a number is out of its range.
    """

    def __init__(
        self,
        async_openai_client: Any = None,
        *,
        gradient_model: str = "gpt-5-mini",
        apply_edit_model: str = "gpt-4.1-mini",
        diversity_temperature: float = 1.0,
        gradient_batch_size: int = 4,
        val_batch_size: int = 16,
        beam_width: int = 4,
        branch_factor: int = 4,
        beam_rounds: int = 3,
        rollout_batch_timeout: float = 3600.0,
        failure_reward: float | None = None,
        max_calls: int | None = None,
        run_initial_validation: bool = True,
        seed: int = 0,
    ) -> None:
        check_counts(
            gradient_batch_size=gradient_batch_size,
            val_batch_size=val_batch_size,
            beam_width=beam_width,
            branch_factor=branch_factor,
            beam_rounds=beam_rounds,
        )
        check_seconds(rollout_batch_timeout=rollout_batch_timeout)
        check_counts(**({} if max_calls is None else {"max_calls": max_calls}), least=0)
        if failure_reward is not None and not math.isfinite(failure_reward):
            raise InvalidValue(f"failure_reward is {failure_reward!r}; give a finite number")
        self._openai = async_openai_client
        self._gradient_model = gradient_model
        self._apply_edit_model = apply_edit_model
        self._temperature = diversity_temperature
        self._gradient_batch_size = gradient_batch_size
        self._val_batch_size = val_batch_size
        self._beam_width = beam_width
        self._branch_factor = branch_factor
        self._beam_rounds = beam_rounds
        self._timeout = rollout_batch_timeout
        self._failure_reward = failure_reward
        self._max_calls = max_calls
        self._calls, self._lowest, self._made = 0, 0.0, 0
        self._last_error: Exception | None = None
        self._run_initial_validation = run_initial_validation
        self._seed = seed
        self._best: ScoredPrompt | None = None

    def get_best_prompt(self) -> PromptTemplate:
        """Return the prompt with the highest mean reward: the result, or, while it runs, the best so far.

        Raises:
            InvalidValue: no prompt has been measured yet.
        """
        if self._best is None:
            raise InvalidValue("no prompt has been measured yet; run the algorithm first")
        return self._best.prompt

    def get_best_score(self) -> float:
        """Return the mean reward of the best prompt; after the run, on the whole validation dataset.

        Raises:
            InvalidValue: no prompt has been measured yet.
        """
        if self._best is None or self._best.score is None:
            raise InvalidValue("no prompt has been measured yet; run the algorithm first")
        return self._best.score

    async def run(  # pyright: ignore[reportIncompatibleMethodOverride] - may be awaited, which the base allows
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> None:
        """Search through all rounds. `get_best_prompt` returns the result, which is also published as resources.

        Raises:
            InvalidValue: there is no dataset, or not exactly one prompt template among the initial resources.
            NothingToLearn: no prompt ever got a reward, or every call of a model failed.
            MissingExtra: no client was given, and there is no ``openai`` package to make one.
        """
        check_datasets(train_dataset=train_dataset, val_dataset=val_dataset)
        if train_dataset is None or val_dataset is None or not (len(train_dataset) and len(val_dataset)):
            raise InvalidValue("APO needs tasks to learn from and tasks to measure with; pass both datasets")
        name, first = self._template()
        self._best = None
        self._calls, self._lowest, self._made = 0, 0.0, 0
        self._last_error = None
        async with self._client() as client:
            await self._search(client, first, train_dataset, val_dataset)
        if self._best is None:
            raise NothingToLearn("no rollout of any prompt got a reward; does the agent succeed, and return one?")
        best = {**(self.get_initial_resources() or {}), name: self._best.prompt}
        await self.get_store().add_resources(best)
        if self._last_error is not None and not self._made:
            raise NothingToLearn(
                "no model answered, so no new prompt was tried; the last error: "
                f"{type(self._last_error).__name__}: {self._last_error}"
            ) from self._last_error

    async def _search(
        self, client: Any, first: PromptTemplate, train_dataset: Dataset[Any], val_dataset: Dataset[Any]
    ) -> None:
        state = self._load() or SearchState(round=0, beam=[ScoredPrompt(prompt=first)])
        self._calls, self._lowest = state.calls, state.lowest
        self._made = state.round  # what earlier rounds made is not known, and they were not in vain
        if state.round == 0 and state.candidates is None and self._run_initial_validation:
            state = SearchState(round=0, beam=await self._score(0, "start", [first], val_dataset))
            self._note_best(state.beam)
        numbers: dict[str, float] = {}
        for round_number in range(state.round, self._beam_rounds):
            if state.candidates is None:
                candidates = await self._branch(client, round_number, state.beam, train_dataset)
                state = SearchState(round=round_number, beam=state.beam, candidates=candidates)
                self._save(state)
            state, numbers = await self._select(state, val_dataset)
            self._save(state)
            if state.round == self._beam_rounds:
                numbers |= await self._confirm(val_dataset)
            self.report(round_number, **numbers)
        if not numbers:  # all rounds were done before
            await self._confirm(val_dataset)

    async def _branch(
        self, client: Any, round_number: int, beam: Sequence[ScoredPrompt], dataset: Dataset[Any]
    ) -> list[PromptTemplate]:
        """Return new prompts, each once. If the budget is not enough for all, each parent in turn gets one."""
        parents = [each.prompt for each in beam for _ in range(self._branch_factor)]
        places = sorted(range(len(parents)), key=lambda place: place % self._branch_factor)
        if self._max_calls is not None:
            places = places[: max(0, self._max_calls - self._calls) // _CALLS_OF_A_PROMPT]
        if len(places) < len(parents):
            enough = f"is enough for {len(places)} new prompts of {len(parents)}"
            _logger.warning("round %d: the budget of %s calls %s", round_number, self._max_calls, enough)
        made = await asyncio.gather(
            *(self._improve(client, round_number, place, parents[place], dataset) for place in sorted(places))
        )
        known = {each.prompt.template for each in beam}
        fresh = {prompt.template: prompt for prompt in made if prompt is not None and prompt.template not in known}
        return list(fresh.values())

    async def _improve(
        self, client: Any, round_number: int, place: int, prompt: PromptTemplate, dataset: Dataset[Any]
    ) -> PromptTemplate | None:
        """Return a rewritten prompt; None if a model does not answer, or its answer is not usable."""
        tasks = _sample(dataset, self._gradient_batch_size, f"{self._seed} {round_number} {place}")
        trials = await self._try(round_number, f"branch{place}-", prompt, tasks, "train")
        trials = [each for each in trials if not each.on_defaults]  # they had another prompt
        adapter = self._adapter if isinstance(self._adapter, TraceToMessages) else TraceToMessages()
        question = ask_for_critique(prompt, trials, adapter)
        try:
            critique = await self._ask(client, self._gradient_model, question)
            reply = await self._ask(client, self._apply_edit_model, ask_for_edit(prompt, critique))
            self._made += 1
            return read_prompt(reply, prompt)
        except InvalidValue as error:
            _logger.warning("round %d: a new prompt is not usable: %s", round_number, error)
        except Exception as error:  # noqa: BLE001 - clients raise what they like, and may be of any kind
            self._last_error = error
            why = f"{type(error).__name__}: {error}"
            _logger.warning("round %d: a model did not answer, so there is a new prompt less: %s", round_number, why)
        return None

    async def _select(self, state: SearchState, dataset: Dataset[Any]) -> tuple[SearchState, dict[str, float]]:
        """Measure what is not measured. Returns the state with the next beam, the best, and numbers to report."""
        unmeasured = [each.prompt for each in state.beam if each.score is None]
        known = [each for each in state.beam if each.score is not None]
        fresh = state.candidates or []
        measured = await self._score(state.round, "val", [*unmeasured, *fresh], dataset)
        # Known ones are judged once more, because a failure may count as less now. Sorting is stable, so of prompts
        # with equal scores the older one is kept.
        ordered = sorted((each.judged(self._worst) for each in [*known, *measured]), key=score_of, reverse=True)
        beam = ordered[: self._beam_width]
        self._note_best(beam)
        numbers = {
            "total_steps": float(self._beam_rounds),
            "prompts_tried": float(len(fresh)),
            "failures": float(sum(each.failures for each in measured)),
            "on_defaults": float(sum(each.on_defaults for each in measured)),
            "llm_calls": float(self._calls),
        }
        if beam[0].score is not None:
            numbers["reward_mean"] = beam[0].score
        return SearchState(round=state.round + 1, beam=beam), numbers

    async def _confirm(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Measure the chosen prompt on all validation tasks, in rollouts that it was not chosen for. Returns numbers to
        report."""
        best = self._best
        if best is None:
            return {}
        tasks = [dataset[place] for place in range(len(dataset))]
        (confirmed,) = await self._score_on(tasks, self._beam_rounds, "final", [best.prompt])
        if confirmed.score is None:
            raise NothingToLearn(
                f"the best prompt (score {best.score:g} in the search) got no reward in any of the {len(tasks)} "
                "validation tasks when it was run again"
            )
        outcome = f"{confirmed.score:.4g} on all {len(tasks)} validation tasks, of which {confirmed.failures} failed"
        _logger.info("the best prompt scores %s; it was chosen for %.4g in the search", outcome, best.score)
        self._best = confirmed
        return {"best_score": confirmed.score, "best_failures": float(confirmed.failures)}

    async def _score(
        self, round_number: int, kind: str, prompts: Sequence[PromptTemplate], dataset: Dataset[Any]
    ) -> list[ScoredPrompt]:
        """Return each prompt with its mean reward over some validation tasks, which are the same for all prompts."""
        return await self._score_on(
            _sample(dataset, self._val_batch_size, f"{self._seed}"), round_number, kind, prompts
        )

    async def _score_on(
        self, tasks: Sequence[Any], round_number: int, kind: str, prompts: Sequence[PromptTemplate]
    ) -> list[ScoredPrompt]:
        async def measure(place: int, prompt: PromptTemplate) -> ScoredPrompt:
            trials = await self._try(round_number, f"{kind}{place}-", prompt, tasks, "val")
            late = [None] * (len(tasks) - len(trials))
            own = [trial.reward for trial in trials if not trial.on_defaults]
            return ScoredPrompt(prompt=prompt, rewards=[*own, *late], on_defaults=len(trials) - len(own))

        measured = await asyncio.gather(*(measure(place, prompt) for place, prompt in enumerate(prompts)))
        self._lowest = min([self._lowest, *(each.lowest for each in measured)])
        return [each.judged(self._worst) for each in measured]

    @property
    def _worst(self) -> float:
        return self._lowest if self._failure_reward is None else self._failure_reward

    def _note_best(self, beam: Sequence[ScoredPrompt]) -> None:
        known = [each.judged(self._worst) for each in (self._best, *beam) if each is not None]
        scored = [each for each in known if each.score is not None]
        self._best = max(scored, key=score_of, default=None)  # the first of equals

    async def _try(
        self, round_number: int, kind: str, prompt: PromptTemplate, tasks: Sequence[Any], mode: RolloutMode
    ) -> list[EndedRollout]:
        """Run the agent with a prompt on some tasks, and return the rollouts that ended in time."""
        store, (name, _) = self.get_store(), self._template()
        resources = await store.add_resources({**(self.get_initial_resources() or {}), name: prompt})
        rollout_ids = await enqueue_inputs(
            self, tasks, mode=mode, resources_id=resources.resources_id, step=round_number, kind=kind
        )
        return [each for each in await wait_for_ends(store, rollout_ids, self._timeout) if each is not None]

    async def _ask(self, client: Any, model: str, question: str) -> str:
        self._calls += 1
        reply = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=self._temperature
        )
        return reply.choices[0].message.content or ""

    @asynccontextmanager
    async def _client(self) -> AsyncGenerator[Any]:
        """Yield the client that was given, or a new one that is closed afterwards."""
        if self._openai is not None:
            yield self._openai
            return
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise MissingExtra(
                "APO asks models by the openai package: pip install 'agentlightning[openai]', or pass a client"
            ) from error
        async with AsyncOpenAI() as client:
            yield client

    def _template(self) -> tuple[str, PromptTemplate]:
        resources = self.get_initial_resources() or {}
        templates = [(name, each) for name, each in resources.items() if isinstance(each, PromptTemplate)]
        if len(templates) != 1:
            raise InvalidValue(
                f"APO improves one prompt template; the initial resources have {len(templates)}. "
                "Pass Trainer(initial_resources={'prompt_template': PromptTemplate(...)})"
            )
        return templates[0]

    def _load(self) -> SearchState | None:
        run = self.get_run()
        checkpoint = None if run is None else run.load_checkpoint()
        if checkpoint is None:
            return None
        self._best = None if checkpoint["best"] is None else ScoredPrompt.model_validate(checkpoint["best"])
        return SearchState.model_validate(checkpoint["state"])

    def _save(self, state: SearchState) -> None:
        run = self.get_run()
        if run is not None:
            state = state.model_copy(update={"calls": self._calls, "lowest": self._lowest})
            best = None if self._best is None else self._best.model_dump()
            run.save_checkpoint({"state": state.model_dump(), "best": best})


def _sample(dataset: Dataset[Any], count: int, seed: str) -> list[Any]:
    places = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
    return [dataset[place] for place in places]


_CALLS_OF_A_PROMPT = 2
"""A critique and a rewriting."""


# --- Requests to models, and their replies ------------------------------------------------------------

_MAX_CHARACTERS = 4000
"""Characters of one conversation that a model sees."""

_FENCE = re.compile(r"\A\s*```[\w-]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_TAGS = re.compile(r"<prompt>\s*\n?(.*?)\n?\s*</prompt>", re.DOTALL)


def ask_for_critique(prompt: PromptTemplate, trials: Sequence[EndedRollout], adapter: TraceToMessages) -> str:
    """Return the request for a textual gradient: what is wrong with a prompt, judged by some rollouts."""
    shown = "\n\n".join(_describe(number, trial, adapter) for number, trial in enumerate(trials, 1))
    return (
        "An agent works with a prompt template. You see the template, and what came of it in some runs, each with "
        "its reward (higher is better). Say what in the template led to the losses, and what to change. Name causes "
        "that hold beyond these runs. Do not write the new template.\n\n"
        f"<template>\n{prompt.template}\n</template>\n\n{shown}"
    )


def ask_for_edit(prompt: PromptTemplate, critique: str) -> str:
    """Return the request for a better prompt, given the critique."""
    names = sorted(prompt.placeholders() or ())
    kept = f"It may use these placeholders and no others: {', '.join(names)}. " if names else ""
    syntax = {"f-string": "Python's str.format", "jinja": "Jinja", "poml": "POML"}[prompt.engine]
    return (
        f"Rewrite a prompt template so that it answers the critique. The language of the template is {syntax}. {kept}"
        "Reply with the new template alone, between <prompt> and </prompt>.\n\n"
        f"<template>\n{prompt.template}\n</template>\n\n<critique>\n{critique}\n</critique>"
    )


def read_prompt(reply: str, like: PromptTemplate) -> PromptTemplate:
    """Return the template in a model's reply, in the language of ``like``. Raises ``InvalidValue`` if the reply is
    empty, or the template is malformed or uses a placeholder that ``like`` lacks."""
    tagged = _TAGS.search(reply)
    text = tagged.group(1) if tagged else reply
    fenced = _FENCE.match(text)
    text = (fenced.group(1) if fenced else text).strip()
    if not text:
        raise InvalidValue("the reply holds no prompt")
    prompt = PromptTemplate(template=text, engine=like.engine)
    unknown = (prompt.placeholders() or set()) - (like.placeholders() or set())
    if unknown:
        raise InvalidValue(f"the new prompt uses {', '.join(sorted(unknown))}, which the agent does not fill in")
    return prompt


def _describe(number: int, trial: EndedRollout, adapter: TraceToMessages) -> str:
    rollout = trial.rollout
    reward = "none" if trial.reward is None else f"{trial.reward:g}"
    why = rollout.reason_message or rollout.reason_code
    outcome = rollout.status if rollout.status == "succeeded" or not why else f"{rollout.status}: {why}"
    said = json.dumps(adapter.examine(trial.spans).made, ensure_ascii=False, default=str)
    if len(said) > _MAX_CHARACTERS:
        said = said[:_MAX_CHARACTERS] + f" … ({len(said) - _MAX_CHARACTERS} characters more)"
    task = json.dumps(rollout.input, ensure_ascii=False, default=str)
    return f'<run number="{number}" reward="{reward}" outcome="{outcome}">\n<task>{task}</task>\n{said}\n</run>'
