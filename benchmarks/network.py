"""What does one expert cost? Arithmetic, parameters, memory and disk, beside SynthSR's network.

    python benchmarks/network.py --out docs/evidence/network.md

Arithmetic is counted by torch (a multiply-add is two operations) on tensors without data. Memory is
the growth of the peak resident size of a fresh process that has torch and the expert loaded, then
enhances one image on the whole working grid on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from commit import commit

if TYPE_CHECKING:
    from remix_bids.experts.unet import ResidualUNet

# The network of SynthSR (Iglesias et al. 2021): a U-Net with two convolutions of 3 x 3 x 3 on each
# level, up and down, one channel in and out. Its tool runs it twice, on the image and on its mirror
# image, as `remix_bids.experts.inference.predict` does: the limit holds a pass against a pass.
SYNTHSR_GRID = (192, 224, 192)
SYNTHSR_WIDTHS = (24, 48, 96, 192, 384)
SYNTHSR_PASSES = 2

LIMITS = {"arithmetic": 0.25, "memory": 3.0, "weights": 60.0}  # share of SynthSR's, GB, MB


def megabytes_at_peak() -> float:
    """Of this process since its start; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure_memory(experts_dir: Path | None) -> None:
    """Enhance one image on the whole grid and print what it took; for a process of its own."""
    import numpy as np
    import torch

    from remix_bids.experts.inference import enhance, load_expert
    from remix_bids.experts.registry import load_registry
    from remix_bids.simulation.acquisition import Sampling
    from remix_bids.simulation.estimate import Estimate
    from remix_bids.spatial import WORKING_GRID

    torch.set_num_threads(1)
    record = load_registry(experts_dir)["4"]
    network = load_expert(record)
    rng = np.random.default_rng(0)
    image = rng.random(WORKING_GRID.shape, dtype=np.float32)
    sampling = Sampling(np.diag([1.0, 1, 0.25, 1])[:3], np.array([1.0, 1, 4]))
    covered = torch.ones(WORKING_GRID.shape, dtype=torch.bool)
    low = Estimate(
        torch.from_numpy(image), covered, sampling, torch.zeros_like(covered) * 0.0, 0.01
    )
    before, start = megabytes_at_peak(), time.process_time()
    enhance(low, record, network=network)
    seconds = time.process_time() - start
    print(json.dumps({"before": before, "peak": megabytes_at_peak(), "cpu_s": seconds}))


def in_a_fresh_process(experts_dir: Path | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure-memory"]
    command += ["--experts-dir", str(experts_dir)] if experts_dir else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def gigaflops(
    design: Callable[[], ResidualUNet], shape: tuple[int, ...], *, image: bool = False
) -> float:
    """Arithmetic of one pass, padded as inference pads; of all passes over an image, if asked."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from remix_bids.experts.inference import predict

    with torch.device("meta"):
        network = design().eval()
        padded = [n + (-n) % network.multiple for n in shape]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if image:
                predict(network, torch.empty(network.inputs, *shape), torch.ones(4))
            else:
                network(torch.empty(1, network.inputs, *padded), torch.ones(1, 4))
    return counter.get_total_flops() / 1e9


def synthsr() -> tuple[float, float]:
    """Parameters, and GFLOP of one pass at `SYNTHSR_GRID`, of its convolutions."""
    widths, voxels = SYNTHSR_WIDTHS, math.prod(SYNTHSR_GRID)
    layers = [(i, o, n) for n, (i, o) in enumerate(pairwise((1, *widths)))]
    layers += [(w, w, n) for n, w in enumerate(widths)]
    layers += [(w + below, w, n) for n, (w, below) in enumerate(pairwise(widths))]
    layers += [(w, w, n) for n, w in enumerate(widths[:-1])]
    parameters = sum(27 * i * o + o for i, o, _ in layers) + widths[0] + 1
    adds = sum(27 * i * o * voxels / 8**n for i, o, n in layers) + widths[0] * voxels
    return parameters, 2 * adds / 1e9


def table(experts_dir: Path | None) -> str:
    memory = in_a_fresh_process(experts_dir)  # before torch makes this process large

    from remix_bids.experts.inference import load_expert
    from remix_bids.experts.registry import load_registry
    from remix_bids.experts.unet import ResidualUNet
    from remix_bids.spatial import WORKING_GRID

    records = list(load_registry(experts_dir))
    networks = {record.name: load_expert(record) for record in records}
    designs = {(n.inputs, n.widths) for n in networks.values()}
    if len(designs) != 1:
        raise SystemExit(f"the experts are of several designs, one was expected: {designs}")
    inputs, widths = designs.pop()
    parameters = sum(p.numel() for p in networks["4"].parameters())
    design = partial(ResidualUNet, inputs, widths)
    own = gigaflops(design, WORKING_GRID.shape)
    same = gigaflops(design, SYNTHSR_GRID)
    image = gigaflops(design, SYNTHSR_GRID, image=True)
    weights = sum(record.path.stat().st_size for record in records) / 1e6
    grew = (memory["peak"] - memory["before"]) / 1e3

    def grid(shape: tuple[int, ...]) -> str:
        return " x ".join(str(n) for n in shape)

    def verdict(value: float, limit: float) -> str:
        return "kept" if value <= limit else "**broken**"

    their_parameters, theirs = synthsr()
    share = same / theirs
    rows = [
        f"One expert: residual U-Net, {inputs} channels in, widths {', '.join(map(str, widths))}.",
        "",
        "| | one expert | SynthSR's network | limit |",
        "| --- | --- | --- | --- |",
        f"| parameters | {parameters / 1e6:.2f} M | {their_parameters / 1e6:.2f} M | |",
        f"| arithmetic, one pass at {grid(SYNTHSR_GRID)} | {same:,.0f} GFLOP, {share:.1%} of "
        f"SynthSR's | {theirs:,.0f} GFLOP | a quarter: "
        f"{verdict(share, LIMITS['arithmetic'])} |",
        f"| arithmetic, one pass on the working grid ({grid(WORKING_GRID.shape)}) | "
        f"{own:,.0f} GFLOP | | |",
        f"| passes for one image (the second is mirrored) | {image / same:.0f} | "
        f"{SYNTHSR_PASSES} | |",
        f"| arithmetic for one image at {grid(SYNTHSR_GRID)} | {image:,.0f} GFLOP, "
        f"{image / theirs:.1%} of one pass of SynthSR's | {SYNTHSR_PASSES * theirs:,.0f} GFLOP | |",
        f"| peak memory on the working grid | {grew:.2f} GB more than loaded, "
        f"{memory['peak'] / 1e3:.2f} GB in all | | 3 GB: "
        f"{verdict(memory['peak'] / 1e3, LIMITS['memory'])} |",
        f"| CPU time on the working grid, one thread | {memory['cpu_s']:.0f} s | | |",
        f"| weights of all {len(records)} networks | {weights:.1f} MB | | 60 MB: "
        f"{verdict(weights, LIMITS['weights'])} |",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write this Markdown file")
    parser.add_argument("--experts-dir", type=Path, help="default: the shipped experts")
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        measure_memory(options.experts_dir)
        return
    rows = table(options.experts_dir)
    print(rows)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            "# One expert, measured\n\n"
            "`python benchmarks/network.py --out docs/evidence/network.md` at commit "
            f"{commit() or 'unknown'}, {date.today()}.\n\n{rows}\n\n"
            "An operation is a multiplication or an addition, as torch counts convolutions; the "
            "pass includes the padding of the grid. SynthSR's figures are counted in the same way "
            "from the design of its network. The seconds depend on the machine and on what else "
            "it does; the other figures do not.\n"
        )


if __name__ == "__main__":
    main()
