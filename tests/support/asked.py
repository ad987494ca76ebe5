"""A request, for tests of replies that do not depend on what was asked."""

from agentlightning.proxy.dialects.base import ModelRequest

ASKED = ModelRequest("policy", True, {})
