"""Resources: the named, versioned things that an algorithm tunes and an agent uses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias
from urllib.parse import quote

from pydantic import BaseModel, Field

from agentlightning.errors import InvalidValue
from agentlightning.types.endpoints import without_key
from agentlightning.types.rollouts import AttemptedRollout
from agentlightning.types.templates import DEFAULT_BOUNDS, TemplateBounds, format_braces, names_in_braces

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

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The fields in the repr. No key is part of it."""
        for name, value in super().__repr_args__():
            yield name, without_key(value) if name == "endpoint" else value

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
        """Return the prompt with the values in place, as `fill` does."""
        return self.fill(kwargs)

    def fill(self, values: Mapping[str, Any], bounds: TemplateBounds = DEFAULT_BOUNDS) -> str:
        """Return the prompt with the values in place. Values the template does not name are ignored.

        The template is not trusted: it cannot reach into the values, nor take more text, work or time than allowed.

        Args:
            values: by the names that the template uses.
            bounds: what filling it may take.

        Raises:
            InvalidValue: The template is malformed, or names a value that is not given.
            TemplateOutOfBounds: It takes more than the bounds allow.
            NotImplementedError: The engine is `poml`.
        """
        if self.engine == "f-string":
            return format_braces(self.template, values, bounds)
        if self.engine == "jinja":
            from agentlightning.types.jinja_templates import format_jinja

            return format_jinja(self.template, values, bounds)
        raise NotImplementedError(
            f"templates of the engine {self.engine!r} cannot be filled; use 'f-string' or 'jinja', "
            "or fill the text in .template yourself"
        )

    def placeholders(self) -> set[str] | None:
        """Return the names that the template takes from its values; None for `poml`. Nothing of it is run.

        Raises:
            InvalidValue: The template is malformed.
            TemplateOutOfBounds: It is too long to be read.
        """
        if self.engine == "jinja":
            from agentlightning.types.jinja_templates import names_in_jinja

            return names_in_jinja(self.template)
        return names_in_braces(self.template) if self.engine == "f-string" else None


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
