from __future__ import annotations

import copy
import logging
import pickle

import pytest
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidValue
from agentlightning.types.resources import LLM, NamedResources, PromptTemplate, ProxyLLM, Resource, ResourcesUpdate
from agentlightning.types.rollouts import Attempt, AttemptedRollout

NAMED: TypeAdapter[NamedResources] = TypeAdapter(NamedResources)


def make_proxy(endpoint: str = "http://h:1/v1") -> ProxyLLM:
    return ProxyLLM(endpoint=endpoint, model="m", api_key="k", sampling_parameters={"temperature": 0.5})


def make_claim() -> AttemptedRollout:
    attempt = Attempt(rollout_id="ro-1", attempt_id="at-2", sequence_id=1, start_time=1.0)
    return AttemptedRollout(rollout_id="ro-1", input=1, start_time=1.0, attempt=attempt)


class TestLLM:
    def test_defaults(self) -> None:
        assert LLM(endpoint="http://h", model="m").model_dump() == {
            "resource_type": "llm",
            "endpoint": "http://h",
            "model": "m",
            "api_key": None,
            "sampling_parameters": {},
        }

    def test_the_base_url_is_the_endpoint_whatever_is_asked(self) -> None:
        llm = LLM(endpoint="http://h/v1/", model="m")
        assert llm.get_base_url() == llm.get_base_url("r", attempt_id="a") == "http://h/v1/"

    def test_the_key_is_not_in_the_repr(self) -> None:
        llm = LLM(endpoint="http://h", model="m", api_key="sk-secret")
        assert "sk-secret" not in repr(llm) + str(llm)
        assert llm.model_dump()["api_key"] == "sk-secret"


class TestProxyLLM:
    def test_is_an_llm_of_its_own_type(self) -> None:
        assert isinstance(make_proxy(), LLM)
        assert make_proxy().resource_type == "proxy_llm"

    @pytest.mark.parametrize(
        ("endpoint", "expected"),
        [
            ("http://h:1", "http://h:1/rollout/ro-1/attempt/at-2"),
            ("http://h:1/", "http://h:1/rollout/ro-1/attempt/at-2"),
            ("http://h:1/v1", "http://h:1/rollout/ro-1/attempt/at-2/v1"),
            ("http://h:1/v1/", "http://h:1/rollout/ro-1/attempt/at-2/v1"),
            ("http://h:1/deep/v1", "http://h:1/deep/rollout/ro-1/attempt/at-2/v1"),
            ("http://h:1/xv1", "http://h:1/xv1/rollout/ro-1/attempt/at-2"),
        ],
    )
    def test_the_base_url_names_the_attempt(self, endpoint: str, expected: str) -> None:
        assert make_proxy(endpoint).get_base_url("ro-1", "at-2") == expected

    @pytest.mark.parametrize("endpoint", ["http://h:1", "http://h:1/v1", "http://h:1/v1/"])
    def test_without_ids_it_is_the_endpoint(self, endpoint: str) -> None:
        assert make_proxy(endpoint).get_base_url(None, None) == endpoint
        assert make_proxy(endpoint).get_base_url() == endpoint

    @pytest.mark.parametrize("ids", [("ro-1", None), (None, "at-2"), ("", "at-2"), ("ro-1", ""), ("", "")])
    def test_one_id_is_not_enough(self, ids: tuple[str | None, str | None]) -> None:
        with pytest.raises(ValueError, match="both ids, or neither") as refusal:
            make_proxy().get_base_url(*ids)
        assert isinstance(refusal.value, InvalidValue)

    def test_an_id_cannot_leave_its_place_in_the_url(self) -> None:
        assert make_proxy().get_base_url("../x", "a/b?c") == "http://h:1/rollout/..%2Fx/attempt/a%2Fb%3Fc/v1"

    def test_becomes_a_plain_llm_for_an_attempt(self) -> None:
        proxy = make_proxy()
        llm = proxy.with_attempted_rollout(make_claim())
        assert type(llm) is LLM
        assert llm.model_dump() == {
            "resource_type": "llm",
            "endpoint": "http://h:1/rollout/ro-1/attempt/at-2/v1",
            "model": "m",
            "api_key": "k",
            "sampling_parameters": {"temperature": 0.5},
        }
        llm.sampling_parameters["temperature"] = 1.0
        assert proxy.sampling_parameters == {"temperature": 0.5}

    def test_reading_the_endpoint_warns_and_says_what_to_do(self, caplog: pytest.LogCaptureFixture) -> None:
        assert make_proxy().endpoint == "http://h:1/v1"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.name.startswith("agentlightning.")
        assert "get_base_url" in record.getMessage()

    def test_nothing_else_warns(self, caplog: pytest.LogCaptureFixture) -> None:
        proxy = make_proxy()
        proxy.get_base_url()
        proxy.get_base_url("r", "a")
        proxy.with_attempted_rollout(make_claim())
        proxy.model_dump()
        proxy.model_dump(mode="json")
        proxy.model_dump_json()
        repr(proxy)
        assert proxy == copy.copy(proxy) == copy.deepcopy(proxy) == proxy.model_copy()
        assert pickle.loads(pickle.dumps(proxy)) == proxy
        assert proxy.model == "m"
        proxy.endpoint = "http://other"
        update = ResourcesUpdate(resources_id="rs", create_time=1, update_time=1, version=1, resources={"llm": proxy})
        assert ResourcesUpdate.model_validate_json(update.model_dump_json()) == update
        assert NAMED.validate_json(NAMED.dump_json({"llm": proxy})) == {"llm": proxy}
        assert caplog.records == []

    def test_a_plain_llm_never_warns(self, caplog: pytest.LogCaptureFixture) -> None:
        assert LLM(endpoint="http://h", model="m").endpoint == "http://h"
        assert caplog.records == []


class TestPromptTemplate:
    def test_fills_braces(self) -> None:
        prompt = PromptTemplate(template="Say {what} to {whom!r}. {{}}", engine="f-string")
        assert prompt.format(what="hi", whom="me", spare=1) == "Say hi to 'me'. {}"

    def test_fills_jinja(self) -> None:
        prompt = PromptTemplate(template="{% for w in words %}{{ w }},{% endfor %}", engine="jinja")
        assert prompt.format(words=["a", "b"]) == "a,b,"

    @pytest.mark.parametrize(
        ("engine", "template"), [("f-string", "{x.__class__}"), ("jinja", "{{ x.__class__.__mro__ }}")]
    )
    def test_lets_no_template_out(self, engine: str, template: str) -> None:
        prompt = PromptTemplate.model_validate({"template": template, "engine": engine})
        with pytest.raises(InvalidValue):
            prompt.format(x=1)

    @pytest.mark.parametrize(("engine", "template"), [("f-string", "{x}"), ("jinja", "{{ x }}")])
    def test_a_missing_value_is_an_error(self, engine: str, template: str) -> None:
        prompt = PromptTemplate.model_validate({"template": template, "engine": engine})
        with pytest.raises(InvalidValue, match=r"\bx\b.*: y"):
            prompt.format(y=1)

    def test_a_value_may_be_called_self(self) -> None:
        assert PromptTemplate(template="{self}", engine="f-string").format(self=1) == "1"

    def test_poml_can_be_kept_but_not_filled(self) -> None:
        prompt = PromptTemplate(template="<poml/>", engine="poml")
        with pytest.raises(NotImplementedError, match=r"'poml'.*'f-string' or 'jinja'"):
            prompt.format()

    def test_other_engines_are_refused(self) -> None:
        with pytest.raises(ValidationError):
            PromptTemplate.model_validate({"template": "", "engine": "mustache"})


class TestNamedResources:
    def test_the_type_decides_the_class(self) -> None:
        resources = NAMED.validate_python(
            {
                "a": {"resource_type": "llm", "endpoint": "e", "model": "m"},
                "b": {"resource_type": "proxy_llm", "endpoint": "e", "model": "m"},
                "c": {"resource_type": "prompt_template", "template": "t", "engine": "jinja"},
            }
        )
        assert [type(resource) for resource in resources.values()] == [LLM, ProxyLLM, PromptTemplate]
        assert all(isinstance(resource, Resource) for resource in resources.values())
        assert NAMED.validate_json(NAMED.dump_json(resources)) == resources

    @pytest.mark.parametrize(
        "resource",
        [{}, {"resource_type": "gpu"}, {"resource_type": "llm"}, {"endpoint": "e", "model": "m"}],
    )
    def test_what_no_type_fits_is_refused(self, resource: dict[str, str]) -> None:
        with pytest.raises(ValidationError):
            NAMED.validate_python({"a": resource})

    def test_an_update_round_trips(self) -> None:
        update = ResourcesUpdate(
            resources_id="rs-1",
            create_time=1.0,
            update_time=2.0,
            version=3,
            resources={"p": PromptTemplate(template="t", engine="f-string"), "m": make_proxy()},
        )
        assert ResourcesUpdate.model_validate_json(update.model_dump_json()) == update
        assert pickle.loads(pickle.dumps(update)) == update
