"""The benchmarks start, and count what they say."""

import math
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from remix_bids.experts.unet import ResidualUNet

SCRIPTS = [
    path
    for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
    if path.stem != "commit"
]


@pytest.fixture
def load(monkeypatch):
    """What a script defines, found as by one that is run; nothing of it is run."""

    def load(script):
        monkeypatch.syspath_prepend(str(script.parent))
        return SimpleNamespace(**runpy.run_path(str(script), run_name="imported"))

    return load


@pytest.fixture
def network(load):
    return load(Path(__file__).parents[1] / "benchmarks" / "network.py")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmarks_find_what_they_import(load, script):
    assert load(script).main


def test_the_count_of_synthsr_is_the_published_one(network):
    parameters, gflop = network.synthsr()
    assert parameters / 1e6 == pytest.approx(13.24, abs=0.005)
    assert gflop == pytest.approx(2555, abs=1)


def test_an_expert_counted_by_hand(network):
    """On the grid padded to a multiple of 8; a multiply-add is two."""
    a, b, c, inputs = 4, 6, 10, 5
    half, quarter, eighth = (math.prod((24, 32, 16)) / 8**n for n in (1, 2, 3))
    adds = 27 * half * (8 * inputs * a + a * a + 2 * a * a + a * a + 8 * a)
    adds += 27 * quarter * (a * b + b * b + 2 * b * b + b * b) + quarter * a * b
    adds += 27 * eighth * (b * c + c * c) + eighth * b * c
    adds += 4 * 32 + 32 * 2 * (a + b + c + b + a)  # what the scan's numbers change
    design = partial(ResidualUNet, inputs, (a, b, c))
    assert network.gigaflops(design, (20, 30, 16)) == pytest.approx(2 * adds / 1e9)
    image = network.gigaflops(design, (20, 30, 16), image=True)
    assert image == pytest.approx(2 * 2 * adds / 1e9)  # two passes
