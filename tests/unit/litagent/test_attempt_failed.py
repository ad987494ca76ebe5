"""``AttemptFailed``: a failure with a reason of the agent's own."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.errors import InvalidValue


def test_it_comes_back_whole_from_a_process_pool() -> None:
    error = agl.AttemptFailed("site_down", "no answer", retry=False)
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message, again.retry, str(again)) == ("site_down", "no answer", False, "no answer")


@pytest.mark.parametrize("code", ["", "Site down", "x" * 65, "1st", "unconfirmed", "released", 7])
def test_a_code_that_no_store_takes_is_refused_where_it_is_made(code: Any) -> None:
    with pytest.raises(InvalidValue, match="code"):
        agl.AttemptFailed(code, "no answer")
