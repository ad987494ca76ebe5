"""Who reaches a proxy: its key, the address that it hands out, and its certificate."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI, AuthenticationError, DefaultAsyncHttpxClient

from agentlightning import LLM, LLMProxy, ProxyLLM, SqliteLightningStore
from agentlightning.errors import InvalidValue
from agentlightning.proxy.address import ProxyAddress
from agentlightning.security.hosts import is_loopback, is_this_machine, outward_address
from agentlightning.security.tls import Serving, TlsFiles
from certificates import self_signed
from command_line import agl
from openai_backend import OpenAIBackend
from proxied import MESSAGES, Proxied, proxied

QUESTION: Any = {"model": "policy", "messages": MESSAGES}
MODELS = [{"model_name": "policy", "litellm_params": {"model": "openai/any", "api_base": "http://127.0.0.1:9/v1"}}]


async def statuses(scene: Proxied, base: str, key: str | None = None) -> tuple[int, int]:
    """How the proxy answers a program that shows this key to a call and to a question for the models."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.post(f"{base}/chat/completions", json=QUESTION) as call:
            pass
        async with session.get(f"{base}/models") as listing:
            return call.status, listing.status


# --- The key -----------------------------------------------------------------------------------------


async def test_a_proxy_on_this_machine_has_a_key_of_its_own() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        attempt = await scene.store.get_latest_attempt(scene.rollout_id)
        assert attempt is not None
        below = f"{scene.proxy.url}/rollout/{scene.rollout_id}/attempt/{attempt.attempt_id}/v1"
        key = scene.proxy.api_key
        assert key is not None
        assert scene.llm.api_key == key
        for base in (below, f"{scene.proxy.url}/v1", f"{scene.proxy.url}/key/a-wrong-key-0123456789/v1"):
            assert await statuses(scene, base) == (401, 401), base
            assert await statuses(scene, base, "a-wrong-key") == (401, 401), base
        assert backend.seen == []
        assert await statuses(scene, below, key) == (200, 200)
    async with proxied(OpenAIBackend()) as another:
        assert another.proxy.api_key != key


async def test_no_key_is_possible_on_purpose() -> None:
    """The negative control."""
    async with proxied(OpenAIBackend(), api_key="") as scene:
        assert scene.proxy.api_key is None
        assert await statuses(scene, f"{scene.proxy.url}/v1") == (200, 200)


async def test_a_program_of_0_3_is_let_in_whatever_key_it_sends(caplog: pytest.LogCaptureFixture) -> None:
    """It calls the endpoint that it is given, and the key is in that; but not where people look."""
    async with proxied(OpenAIBackend()) as scene:
        key = scene.proxy.api_key
        assert key is not None
        async with AsyncOpenAI(base_url=scene.llm.endpoint, api_key="dummy", max_retries=0) as agent:
            await agent.chat.completions.create(**QUESTION)
            with pytest.raises(Exception, match="There is no POST"):
                await agent.post("/nonsense", cast_to=object, body={})
        spans = await scene.spans()
        assert [span.name for span in spans] == ["chat policy", "refused request"]
        assert key in scene.llm.endpoint
        for shown in (repr(scene.llm), repr(scene.proxy.as_resource()), caplog.text, *map(repr, spans)):
            assert key not in shown


async def test_a_key_of_the_user_is_in_no_address() -> None:
    async with proxied(OpenAIBackend(), api_key="key-of-the-user") as scene:
        assert "key-of-the-user" not in scene.llm.endpoint
        async with AsyncOpenAI(base_url=scene.llm.endpoint, api_key="dummy", max_retries=0) as agent:
            with pytest.raises(AuthenticationError):
                await agent.chat.completions.create(**QUESTION)


def test_the_key_in_an_address_is_hidden_by_commands(tmp_path: Path) -> None:
    proxy = LLMProxy(port=4321, model_list=MODELS)

    async def keep() -> None:
        async with SqliteLightningStore(tmp_path / "store.db") as store:
            await store.add_resources({"llm": proxy.as_resource()})

    asyncio.run(keep())
    assert proxy.api_key is not None
    for more, is_shown in (((), False), (("-o", "json"), False), (("--show-keys",), True)):
        out = agl("resources", "show", *more, "--url", tmp_path / "store.db").ok().out
        assert (proxy.api_key in out) == is_shown
        assert "http://127.0.0.1:4321/key/" in out


async def test_no_proxy_without_a_key_is_reached_by_others() -> None:
    proxy = LLMProxy(model_list=MODELS, host="0.0.0.0", api_key="")
    with pytest.raises(InvalidValue, match=r"other machines can reach '0\.0\.0\.0'.*api_key=''.*host='localhost'"):
        await proxy.start()


# --- The address -------------------------------------------------------------------------------------


def address(
    host: str | None = None, port: int | None = None, public_url: str | None = None, tls: TlsFiles | None = None
) -> ProxyAddress:
    return ProxyAddress(host, port, public_url, tls)


def test_a_proxy_listens_where_the_store_is_served() -> None:
    tls = TlsFiles(Path("cert.pem"), Path("key.pem"))
    followed = address()
    assert (followed.host, followed.tls) == ("127.0.0.1", None)
    followed.follow(Serving("0.0.0.0", tls))
    assert (followed.host, followed.tls) == ("0.0.0.0", tls)
    own = address("127.0.0.1")
    own.follow(Serving("0.0.0.0", tls))
    assert (own.host, own.tls) == ("127.0.0.1", None), "nothing is encrypted on loopback unless it is asked for"


def test_what_leads_every_machine_to_itself_is_not_for_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = address("127.0.0.1").why_no_guests()
    assert explicit is not None
    assert "host='127.0.0.1'; without that it would listen where the store is served" in explicit
    assert "LLMProxy(public_url='http://NAME:PORT')" in explicit
    assert address("127.0.0.1", public_url="http://gpu-1:4748").why_no_guests() is None
    assert address("gpu-1").why_no_guests() is None
    monkeypatch.setattr("agentlightning.proxy.address.outward_address", lambda: None)
    alone = address("0.0.0.0").why_no_guests()
    assert alone is not None
    assert "no other address" in alone
    monkeypatch.setattr("agentlightning.proxy.address.outward_address", lambda: "10.1.2.3")
    assert address("0.0.0.0").why_no_guests() is None
    assert address("0.0.0.0", 4748).url == "http://10.1.2.3:4748"


@pytest.mark.parametrize(
    ("port", "public_url", "tls", "listens"),
    [
        (None, "http://gpu-1:4748", False, 4748),
        (None, "http://gpu-1:4748/v1", False, 4748),
        (5000, "http://gpu-1:4748", False, 5000),
        (None, "https://gpu-1:4748", True, 4748),
        (None, "https://gpu-1:4748", False, 0),  # something in front of the proxy encrypts
        (None, "https://gpu.example/llm/v1/", False, 0),
    ],
)
def test_the_public_url_is_the_one_argument(port: int | None, public_url: str, tls: bool, listens: int) -> None:
    files = TlsFiles(Path("cert.pem"), Path("key.pem")) if tls else None
    assert address(None, port, public_url, files).port == listens
    proxy = LLMProxy(port, MODELS, public_url=public_url)
    resource = proxy.as_resource()
    assert type(resource) is ProxyLLM
    base = public_url.rstrip("/").removesuffix("/v1")
    assert resource.get_base_url("r", "a") == f"{base}/rollout/r/attempt/a/v1", "no key is in a public address"


@pytest.mark.parametrize("public_url", ["gpu-1:4748", "ftp://gpu-1", "http://", "http://gpu-1:many"])
def test_a_public_url_is_a_url(public_url: str) -> None:
    with pytest.raises(InvalidValue, match=r"public_url .* is no URL; give one like http://gpu-1:4748"):
        LLMProxy(public_url=public_url)


def test_addresses_of_this_machine() -> None:
    mine = outward_address()
    for each in ("127.0.0.1", "::1", "::ffff:127.0.0.1", *([] if mine is None else [mine])):
        assert is_this_machine(each)
    for each in ("192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"):
        assert not is_this_machine(each)
    assert mine is None or not is_loopback(mine)
    assert is_loopback("::ffff:127.0.0.1")


# --- The certificate ---------------------------------------------------------------------------------


async def test_a_proxy_with_a_certificate(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    trusted = ssl.create_default_context(cafile=str(certificate))
    async with proxied(OpenAIBackend(), tls_certificate=certificate, tls_key=key) as scene:
        assert scene.llm.endpoint.startswith("https://127.0.0.1:")
        async with AsyncOpenAI(
            base_url=scene.llm.endpoint,
            api_key=scene.llm.api_key,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(verify=trusted),
        ) as agent:
            assert (await agent.chat.completions.create(**QUESTION)).choices
        async with scene.client() as stranger:
            with pytest.raises(Exception, match="Connection error"):
                await stranger.chat.completions.create(**QUESTION)
        assert [span.name for span in await scene.spans()] == ["chat policy"]


@pytest.mark.parametrize("files", [{"tls_certificate": "cert.pem"}, {"tls_key": "key.pem"}])
def test_a_certificate_has_a_key(files: Any) -> None:
    with pytest.raises(InvalidValue, match="give both tls_certificate and tls_key"):
        LLMProxy(**files)


def test_the_repr_of_another_model_is_whole() -> None:
    assert "http://host/v1/key/x" in repr(LLM(endpoint="http://host/v1/key/x", model="m"))
