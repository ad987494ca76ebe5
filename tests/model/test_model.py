"""The store beside a small reference model, step by step. See ``model_rules`` for the steps."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from model_compare import Divergence
from model_rules import StoreMachine


def run_steps(machine, target, seeds):
    began = time.monotonic()
    for s in seeds:
        seed(s)(machine)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=20,
                stateful_step_count=50,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        print(s, machine.steps_run, time.monotonic() - began)
        if machine.steps_run >= target:
            break


def test_x():
    class M(StoreMachine):
        pass

    M.steps_run = 0
    run_steps(M, 5000, itertools.count())
