"""Resources: the named, versioned things that an algorithm tunes and an agent uses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias
from urllib.parse import quote

from pydantic import BaseModel, Field

from agentlightning.errors import InvalidValue
from agentlightning.types.rollouts import AttemptedRollout

if TYPE_CHECKING:
    from jinja2 import Template


# --- Filling prompt templates, in two languages ---

_FORMATTER = Formatter()


def format_braces(template: str, values: Mapping[str, Any], *, levels: int = 2) -> str:
    """Fill a template as `str.format` does, save that a placeholder is a plain name.

    ``{name}``, ``{name!r}``, ``{name:>10}``, ``{name:{width}}``, and ``{{`` and ``}}`` for
    literal braces. No ``{}`` or ``{0}``, no ``{name.attribute}``, no ``{name[index]}``. A format
    spec may hold placeholders, whose own spec may not: the two ``levels`` of `str.format`.

    Raises:
        InvalidValue: The template is malformed, a placeholder is not a plain name or has no
            value, or a value does not take its format spec.
    """
    if levels == 0:
        raise InvalidValue(f"the format spec {template!r} is nested too deep; placeholders go two levels deep at most")
    try:
        pieces = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise InvalidValue(f"the template is malformed: {error}; write '{{{{' and '}}}}' for literal braces") from error
    filled: list[str] = []
    for literal, name, spec, conversion in pieces:
        filled.append(literal)
        if name is not None:
            filled_spec = format_braces(spec, values, levels=levels - 1) if spec else ""
            filled.append(_render(name, _look_up(name, values), filled_spec, conversion))
    return "".join(filled)


def format_jinja(template: str, values: Mapping[str, Any]) -> str:
    """Fill a Jinja template in a sandbox. A name that has no value is an error, not an empty text.

    Nothing is escaped, since a prompt is not HTML, and a newline at the end stays.

    Raises:
        InvalidValue: The template is malformed, uses a name without a value, does what the
            sandbox forbids, or fails in some other way.
    """
    try:
        return _compile_jinja(template).render(values)
    except Exception as error:  # a boundary: a template is a program, and whatever it raises is its error
        raise InvalidValue(
            f"the jinja template cannot be filled: {error} ({type(error).__name__}); {_given(values)}"
        ) from error


def _look_up(name: str, values: Mapping[str, Any]) -> Any:
    if not name or name.isdecimal():
        raise InvalidValue(f"the placeholder '{{{name}}}' has no name; values are given by name: write '{{some_name}}'")
    if "." in name or "[" in name:
        raise InvalidValue(
            f"the placeholder '{{{name}}}' reaches into a value, which a template must not; "
            "pass what it needs under a plain name of its own"
        )
    if name not in values:
        raise InvalidValue(
            f"the placeholder '{{{name}}}' has no value; {_given(values)}; "
            "write '{{' and '}}' if the braces were meant literally"
        )
    return values[name]


def _render(name: str, value: Any, spec: str, conversion: str | None) -> str:
    try:
        return format(_FORMATTER.convert_field(value, conversion), spec)
    except Exception as error:  # a boundary: the value's own __format__, __str__ or __repr__ runs here
        shown = f"{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
        raise InvalidValue(
            f"the placeholder '{{{name}{shown}}}' cannot show a value of type {type(value).__name__}: {error}"
        ) from error


def _given(values: Mapping[str, Any]) -> str:
    return f"the names given are: {', '.join(sorted(values))}" if values else "no names were given"


@lru_cache(maxsize=128)
def _compile_jinja(template: str) -> Template:
    """Compile once per text: it takes about a hundred times longer than filling."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)


# ---

_logger = logging.getLogger(__name__)


class Resource(BaseModel):
    """What all resources have in common."""

    resource_type: Any
    """Says which class of resource this is, on the wire too."""


class LLM(Resource):
    """A language model behind an endpoint that speaks the OpenAI protocol."""

    resource_type: Literal["llm"] = "llm"
    endpoint: str
    """The URL that a client takes as its base URL, such as ``http://host:8000/v1``."""
    model: str
    api_key: str | None = Field(default=None, repr=False)
    """The key for the endpoint. `None`: it needs none, or the agent has its own. Never part of the repr."""
    sampling_parameters: dict[str, Any] = Field(default_factory=dict[str, Any])
    """What the agent is to send with each call: temperature, max_tokens, and so on."""

    def get_base_url(self, *args: Any, **kwargs: Any) -> str:
        """Return the base URL for a client. Arguments are for subclasses; here they change nothing."""
        return self.endpoint


class ProxyLLM(LLM):
    """A language model behind our proxy, which has to be told for which attempt it works.

    Reading `endpoint` logs a warning, because calls that go there are recorded under no
    attempt: use `get_base_url` or `with_attempted_rollout`. Printing, comparing, copying
    and serialising do not warn.
    """

    # The tag is what tells the two apart, so here the subclass cannot do with the values of the base.
    resource_type: Literal["proxy_llm"] = "proxy_llm"  # pyright: ignore[reportIncompatibleVariableOverride]

    if not TYPE_CHECKING:  # else a type checker would take every misspelt attribute

        def __getattribute__(self, name: str) -> Any:
            # pydantic itself reads fields from __dict__, so what comes by here is somebody's code.
            if name == "endpoint":
                _logger.warning(
                    "ProxyLLM.endpoint was read directly; calls to it are recorded under no attempt. "
                    "Use get_base_url(rollout_id, attempt_id) or with_attempted_rollout(rollout) instead."
                )
            return super().__getattribute__(name)

    def get_base_url(self, rollout_id: str | None = None, attempt_id: str | None = None) -> str:
        """Return the base URL under which the proxy records calls for one attempt.

        That is ``{endpoint}/rollout/{rollout_id}/attempt/{attempt_id}``, where a ``/v1`` at the
        end of the endpoint stays at the end. Without ids it is the endpoint itself, as it was given.

        Raises:
            InvalidValue: One id is given without the other, or an id is empty.
        """
        endpoint: str = self.__dict__["endpoint"]
        if rollout_id is None and attempt_id is None:
            return endpoint
        if not rollout_id or not attempt_id:
            raise InvalidValue(
                f"rollout_id is {rollout_id!r} and attempt_id is {attempt_id!r}; give both ids, or neither"
            )
        base = endpoint.rstrip("/")
        root = base.removesuffix("/v1")
        version = base[len(root) :]
        return f"{root}/rollout/{quote(rollout_id, safe='')}/attempt/{quote(attempt_id, safe='')}{version}"

    def with_attempted_rollout(self, rollout: AttemptedRollout) -> LLM:
        """Return a plain `LLM` whose calls the proxy records for this rollout's attempt."""
        url, sampling = self.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id), self.sampling_parameters
        return LLM(endpoint=url, model=self.model, api_key=self.api_key, sampling_parameters=dict(sampling))


class PromptTemplate(Resource):
    """A prompt with places for values."""

    resource_type: Literal["prompt_template"] = "prompt_template"
    template: str
    engine: Literal["jinja", "f-string", "poml"]
    """The language of the template. `poml` can be stored and read, not filled."""

    def format(self, /, **kwargs: Any) -> str:
        """Return the prompt with the values in place. Values the template does not name are ignored.

        The template is not trusted: see `agentlightning.types.resources` for what each language
        lets it do with the values.

        Raises:
            InvalidValue: The template is malformed, or names a value that is not given.
            NotImplementedError: The engine is `poml`.
        """
        if self.engine == "f-string":
            return format_braces(self.template, kwargs)
        if self.engine == "jinja":
            return format_jinja(self.template, kwargs)
        raise NotImplementedError(
            f"templates of the engine {self.engine!r} cannot be filled; use 'f-string' or 'jinja', "
            "or fill the text in .template yourself"
        )


ResourceUnion: TypeAlias = Annotated[LLM | ProxyLLM | PromptTemplate, Field(discriminator="resource_type")]
"""Any resource. `resource_type` says which."""

NamedResources: TypeAlias = dict[str, ResourceUnion]
"""The resources of a rollout by the names the agent knows them by."""


class ResourcesUpdate(BaseModel):
    """One version of the named resources. It never changes: another content is another version.

    Times are seconds since the Unix epoch.
    """

    resources_id: str
    create_time: float
    """When the first version was made."""
    update_time: float
    """When this version was made."""
    version: int
    """1 for the first, one more for each that follows."""
    resources: NamedResources
