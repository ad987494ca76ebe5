"""Components from specs: every shape works, and every wrong one is told by name."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from agentlightning.errors import InvalidValue
from agentlightning.trainer.components import build_component, load_class


class Engine:
    def __init__(self, size: int = 1, port: int | None = None) -> None:
        self.size = size
        self.port = port


class BigEngine(Engine):
    pass


def make_engine() -> Engine:
    return Engine(7)


REGISTRY = {"dict": "collections.OrderedDict"}


def build(spec: Any, **options: Any) -> Any:
    return build_component(spec, expected_type=Engine, spec_name="engine", **options)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (Engine(3), 3),
        (Engine, 1),
        (BigEngine, 1),
        (make_engine, 7),
        (lambda: Engine(9), 9),
        ({"type": BigEngine, "size": 4}, 4),
    ],
)
def test_every_shape_of_a_spec(spec: Any, size: int) -> None:
    assert build(spec).size == size


def test_an_object_is_taken_as_it_is() -> None:
    engine = Engine()
    assert build(engine) is engine


@pytest.mark.parametrize(
    "spec", ["collections.OrderedDict", "dict", {"type": "collections.OrderedDict"}, {"name": "dict"}, {"type": "dict"}]
)
def test_paths_and_names(spec: Any) -> None:
    made = build_component(spec, expected_type=OrderedDict, spec_name="table", registry=REGISTRY)
    assert type(made) is OrderedDict


def test_arguments_of_a_dict_reach_the_class() -> None:
    made = build_component({"name": "dict", "one": 1}, expected_type=OrderedDict, spec_name="table", registry=REGISTRY)
    assert made == {"one": 1}


def test_a_dict_without_a_type_makes_the_default_class() -> None:
    assert build({"size": 5}, dict_default_cls=BigEngine).size == 5
    with pytest.raises(InvalidValue, match="'type' or 'name'"):
        build({"size": 5})


def test_none_is_the_default_or_none() -> None:
    assert build(None, default_factory=make_engine).size == 7
    assert build(None, allow_none=True) is None
    with pytest.raises(InvalidValue, match="engine is None"):
        build(None)


def test_optional_defaults_go_where_there_is_room_for_them() -> None:
    defaults = {"port": lambda: 4747, "unknown": lambda: 1}
    assert build(Engine, optional_defaults=defaults).port == 4747
    assert build({"type": Engine, "port": 1}, optional_defaults=defaults).port == 1
    assert build(make_engine, optional_defaults=defaults).port is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (5, "engine is 5, of type int"),
        ("nothing", "neither a dotted path nor a known name"),
        ("no.such.module", "no module 'no'"),
        ("collections.NoSuchClass", "no class or function 'NoSuchClass'"),
        ("collections.OrderedDict", "a Engine is needed"),
        ({"type": Engine, "name": "big"}, "both 'type' and 'name'"),
        ({"type": 5}, "'type' is a int"),
    ],
)
def test_a_wrong_spec_is_told(spec: Any, words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        build(spec, registry={"big": "x.Big"})


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        build({"type": Engine, "colour": "red"})


def test_load_class_needs_a_path() -> None:
    assert load_class("collections.OrderedDict") is OrderedDict
    with pytest.raises(InvalidValue, match="not a dotted path"):
        load_class("OrderedDict")


def test_an_import_that_fails_inside_the_module_is_its_own_error(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import a_module_that_does_not_exist\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        load_class("half_there.Thing")
