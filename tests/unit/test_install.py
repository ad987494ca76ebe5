"""The core stays a light install: few packages, few megabytes."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MAX_PACKAGES = 45
MAX_MEGABYTES = 65.0
"""Files as they are in the wheels; the bytecode that an installer may compile from them is not counted."""


def needed_by(name: str) -> set[str]:
    """Every package that comes with ``name`` when it is installed without extras, without ``name`` itself."""
    known: dict[str, frozenset[str]] = {}
    pending = [(canonicalize_name(name), frozenset[str]())]
    while pending:
        package, extras = pending.pop()
        if package in known and extras <= known[package]:
            continue
        known[package] = extras | known.get(package, frozenset())
        for line in distribution(package).requires or ():
            requirement = Requirement(line)
            chosen = ({"extra": extra} for extra in {"", *extras})
            if requirement.marker is None or any(requirement.marker.evaluate(each) for each in chosen):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return set(known) - {canonicalize_name(name)}


def megabytes(package: str) -> float:
    files = (Path(file.locate()) for file in distribution(package).files or () if file.suffix != ".pyc")
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def test_the_core_is_a_light_install() -> None:
    packages = needed_by("agentlightning")
    sizes = {package: megabytes(package) for package in packages}
    assert len(packages) <= MAX_PACKAGES, sorted(packages)
    assert sum(sizes.values()) < MAX_MEGABYTES, sorted(sizes.items(), key=lambda each: -each[1])


def test_the_count_sees_what_is_needed() -> None:
    """The negative control: direct and indirect requirements, those of extras only where they are asked for."""
    packages = needed_by("agentlightning")
    assert {"pydantic", "pydantic-core", "uvloop", "opentelemetry-api"} <= packages
    assert not packages & {"openai", "langgraph", "pytest", "numpy", "torch"}
    assert megabytes("apsw") > 1
