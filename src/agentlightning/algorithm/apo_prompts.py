"""The requests of `APO` to the models that improve prompts, and how their replies are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from agentlightning.errors import InvalidValue
from agentlightning.types import PromptTemplate

_MAX_CHARACTERS = 4000
"""Characters of one conversation that a model sees."""

_FENCE = re.compile(r"\A\s*```[\w-]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_TAGS = re.compile(r"<prompt>\s*\n?(.*?)\n?\s*</prompt>", re.DOTALL)


@dataclass(frozen=True)
class Trial:
    """One rollout with a prompt."""

    task: Any
    reward: float | None
    outcome: str
    """The rollout's status, with the reason if it failed."""
    conversations: Sequence[Any]
    """OpenAI messages."""


def ask_for_critique(prompt: PromptTemplate, trials: Sequence[Trial]) -> str:
    """Return the request for a textual gradient: what is wrong with a prompt, judged by some rollouts."""
    shown = "\n\n".join(_describe(number, trial) for number, trial in enumerate(trials, 1))
    return (
        "An agent works with a prompt template. You see the template, and what came of it in some runs, each with "
        "its reward (higher is better). Say what in the template led to the losses, and what to change. Name causes "
        "that hold beyond these runs. Do not write the new template.\n\n"
        f"<template>\n{prompt.template}\n</template>\n\n{shown}"
    )


def ask_for_edit(prompt: PromptTemplate, critique: str) -> str:
    """Return the request for a better prompt, given the critique."""
    names = sorted(placeholders(prompt) or ())
    kept = f"It may use these placeholders and no others: {', '.join(names)}. " if names else ""
    syntax = {"f-string": "Python's str.format", "jinja": "Jinja", "poml": "POML"}[prompt.engine]
    return (
        f"Rewrite a prompt template so that it answers the critique. The language of the template is {syntax}. {kept}"
        "Reply with the new template alone, between <prompt> and </prompt>.\n\n"
        f"<template>\n{prompt.template}\n</template>\n\n<critique>\n{critique}\n</critique>"
    )


def read_prompt(reply: str, like: PromptTemplate) -> PromptTemplate:
    """Return the template in a model's reply, in the language of ``like``.

    Raises:
        InvalidValue: the reply is empty, or the template is malformed or uses a placeholder that ``like`` lacks.
    """
    tagged = _TAGS.search(reply)
    text = tagged.group(1) if tagged else reply
    fenced = _FENCE.match(text)
    text = (fenced.group(1) if fenced else text).strip()
    if not text:
        raise InvalidValue("the reply holds no prompt")
    prompt = PromptTemplate(template=text, engine=like.engine)
    unknown = (placeholders(prompt) or set()) - (placeholders(like) or set())
    if unknown:
        raise InvalidValue(f"the new prompt uses {', '.join(sorted(unknown))}, which the agent does not fill in")
    return prompt


def placeholders(prompt: PromptTemplate) -> set[str] | None:
    """Return the names of a template's placeholders; None for a language that is not parsed here.

    Raises:
        InvalidValue: the template is malformed.
    """
    if prompt.engine == "f-string":
        try:
            return {name for _, name, _, _ in Formatter().parse(prompt.template) if name is not None}
        except ValueError as error:
            raise InvalidValue(f"the template is malformed: {error}") from error
    if prompt.engine == "jinja":
        from jinja2 import Environment, TemplateSyntaxError, meta

        # Parsed and not rendered, because a model wrote the template and its code must not run here.
        environment = Environment(autoescape=True)
        try:
            return set(meta.find_undeclared_variables(environment.parse(prompt.template)))
        except TemplateSyntaxError as error:
            raise InvalidValue(f"the template is malformed: {error}") from error
    return None


def _describe(number: int, trial: Trial) -> str:
    reward = "none" if trial.reward is None else f"{trial.reward:g}"
    said = json.dumps(trial.conversations, ensure_ascii=False, default=str)
    if len(said) > _MAX_CHARACTERS:
        said = said[:_MAX_CHARACTERS] + f" … ({len(said) - _MAX_CHARACTERS} characters more)"
    task = json.dumps(trial.task, ensure_ascii=False, default=str)
    return f'<run number="{number}" reward="{reward}" outcome="{trial.outcome}">\n<task>{task}</task>\n{said}\n</run>'
