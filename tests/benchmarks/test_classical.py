"""Classical methods at the weights that suit them best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import classical
from benchmarks.cases import make_scenario
from benchmarks.classical import EXPONENTS, METHODS, best_images, climb
from recon.errors import ReconError
from recon.solvers.cg import cg
from tests.benchmarks.head_phantom import SHAPE, case


@pytest.fixture(scope="module")
def scenario():
    return make_scenario(case(), "equispaced", 4)


@settings(deadline=None, max_examples=30)
@given(
    peaks=st.lists(st.floats(EXPONENTS[0] - 3, EXPONENTS[1] + 3), min_size=1, max_size=2),
    start=st.sets(st.integers(*EXPONENTS), min_size=1, max_size=3),
)
def test_climb_finds_the_argmax_of_the_whole_grid(peaks, start):
    def evaluate(k):
        return {str(i): {"PSNR": -((k - peak) ** 2)} for i, peak in enumerate(peaks)}

    tried = climb(evaluate, start)
    for target in evaluate(0):
        everywhere = max(range(EXPONENTS[0], EXPONENTS[1] + 1), key=lambda k: evaluate(k)[target]["PSNR"])
        assert evaluate(classical.best(tried, target)) == evaluate(everywhere)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_best_images_are_those_of_the_best_weight(scenario, method):
    tried: list[tuple[bool, float]] = []

    def solve(y, maps, weights, weight):
        tried.append((bool((maps == 0).any()), weight))
        return method.solve(y, maps, weights, weight)

    found = best_images(replace(method, solve=solve, start=(-8,)), scenario)
    assert len(set(tried)) == len(tried) > 2
    assert set(found) == set(scenario.case.targets)

    problem = scenario.problem
    scale = float(problem.operator.adjoint(problem.y).abs().max())
    weights = scenario.mask.mask.expand(SHAPE).numpy().astype(np.float32)
    for target, item in found.items():
        reference = scenario.case.targets[target].numpy()
        assert classical.score_one(reference, item.image) == item.scores
        # Neither half nor twice the weight is better, by the method itself on the same maps.
        maps = scenario.cropped_maps if item.cropped else scenario.maps
        psnrs = []
        for factor in (0.5, 1, 2):
            image = method.solve((problem.y / scale).numpy(), maps.numpy(), weights, factor * item.weight)
            psnrs.append(classical.psnr(reference[None], scale * np.abs(image)[None]))
        assert psnrs[1] == pytest.approx(item.scores["PSNR"], abs=1e-4)
        assert max(psnrs) == psnrs[1]


def test_only_the_targets_asked_for_are_climbed_to(scenario):
    everything = best_images(METHODS[0], scenario)
    alone = best_images(METHODS[0], scenario, ["combined"])
    assert list(alone) == ["combined"]
    assert alone["combined"].scores == everything["combined"].scores


def test_nothing_acquired_is_an_error(scenario):
    problem = replace(scenario.problem, y=0 * scenario.problem.y)
    with pytest.raises(ReconError, match="phantom: the acquired data are all zero"):
        best_images(METHODS[0], replace(scenario, problem=problem))


def test_cg_sense_solves_its_normal_equations(scenario):
    problem = scenario.problem
    scale = float(problem.operator.adjoint(problem.y).abs().max())
    weights = scenario.mask.mask.expand(SHAPE).numpy().astype(np.float32)
    theirs = classical.cg_sense((problem.y / scale).numpy(), scenario.cropped_maps.numpy(), weights, 0.05)
    ours = cg(
        lambda x: problem.operator.normal(x) + 0.05 * x,
        problem.operator.adjoint(problem.y / scale),
        max_iter=200,
        tol=1e-7,
    ).x
    assert np.linalg.norm(theirs - ours.numpy()) < 1e-3 * np.linalg.norm(theirs)
