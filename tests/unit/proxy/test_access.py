"""Who may use a proxy: its access policy is asked about every request that needs a permission."""

from __future__ import annotations

import aiohttp
import pytest
from openai import PermissionDeniedError

from agentlightning.errors import NotAllowed
from agentlightning.security.access import Permission, Principal
from openai_backend import OpenAIBackend
from proxied import MESSAGES, proxied

KEY, CONTROL_KEY = "key-for-agents-0123", "key-for-control-0123"


class Only:
    """A policy that allows one permission, and keeps what it was asked."""

    def __init__(self, allowed: Permission) -> None:
        self.allowed = allowed
        self.asked: list[tuple[str, Permission]] = []

    def authorize(self, principal: Principal, permission: Permission) -> None:
        self.asked.append((principal.name, permission))
        if permission != self.allowed:
            raise NotAllowed(f"{principal.name} may not {permission}")


async def resume(url: str) -> tuple[int, str]:
    """Use a control route, and look at one that needs no permission."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/health") as reply:
            assert reply.status == 200
        async with session.post(f"{url}/control/resume", headers={"Authorization": f"Bearer {CONTROL_KEY}"}) as reply:
            return reply.status, await reply.text()


async def test_a_policy_that_forbids_agents_to_call() -> None:
    backend, policy = OpenAIBackend(), Only("operate")
    async with proxied(backend, api_key=KEY, control_key=CONTROL_KEY, access_policy=policy) as scene:
        async with scene.client() as agent:
            with pytest.raises(PermissionDeniedError, match="agent may not run") as caught:
                await agent.chat.completions.create(model="policy", messages=MESSAGES)
        assert (caught.value.status_code, caught.value.code) == (403, "not_allowed")
        assert (await resume(scene.proxy.url))[0] == 200
        assert (backend.seen, await scene.spans()) == ([], [])
    assert policy.asked == [("agent", "run"), ("control", "operate")]


async def test_a_policy_that_forbids_control() -> None:
    policy = Only("run")
    async with proxied(OpenAIBackend(), control_key=CONTROL_KEY, access_policy=policy) as scene:
        async with scene.client() as agent:
            assert (await agent.chat.completions.create(model="policy", messages=MESSAGES)).choices
        status, body = await resume(scene.proxy.url)
        assert status == 403
        assert "control may not operate" in body
    assert policy.asked == [("agent", "run"), ("control", "operate")]
