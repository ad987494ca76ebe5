from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from agentlightning.types.contract import UNSET, Unset


class Change(BaseModel):
    number: int | Unset = UNSET
    anything: object = None


def test_is_falsy_and_says_its_name() -> None:
    assert not UNSET
    assert repr(UNSET) == str(UNSET) == "UNSET"
    assert UNSET is not None
    assert isinstance(UNSET, Unset)


def test_is_the_only_instance() -> None:
    assert list(Unset) == [UNSET]
    with pytest.raises((TypeError, ValueError)):
        Unset("UNSET")  # type: ignore[call-arg]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickle(protocol: int) -> None:
    assert pickle.loads(pickle.dumps(UNSET, protocol)) is UNSET
    assert pickle.loads(pickle.dumps({"a": [UNSET]}, protocol))["a"][0] is UNSET


def test_survives_pickle_into_another_process() -> None:
    program = (
        "import pickle, sys; from agentlightning.types import UNSET; "
        f"sys.exit(0 if pickle.loads({pickle.dumps(UNSET)!r}) is UNSET else 3)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_survives_copy() -> None:
    assert copy.copy(UNSET) is UNSET
    assert copy.deepcopy(UNSET) is UNSET
    assert copy.deepcopy({"a": [UNSET]})["a"][0] is UNSET


def test_works_as_the_default_of_a_field() -> None:
    assert Change().number is UNSET
    assert Change(number=UNSET).number is UNSET
    assert Change(number=3).number == 3


@pytest.mark.parametrize("body", ['{"number": "UNSET"}', '{"number": null}', '{"number": {}}'])
def test_nothing_from_json_becomes_unset(body: str) -> None:
    with pytest.raises(ValidationError):
        Change.model_validate_json(body)
    assert Change.model_validate_json('{"anything": "UNSET"}').anything == "UNSET"


def test_is_never_written_as_json() -> None:
    with pytest.raises(PydanticSerializationError):
        Change().model_dump_json()
    with pytest.raises(PydanticSerializationError):
        Change(number=1, anything={"deep": UNSET}).model_dump_json()
