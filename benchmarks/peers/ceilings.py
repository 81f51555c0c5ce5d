"""What the idle device can do at most, by size of micro-batch: python -m benchmarks.peers.ceilings SHAPE SLOTS...

A process of its own, so that nothing of it is in memory when somebody is timed.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.peers.protocol import write_row
from benchmarks.peers.shapes import SHAPES
from packloop.bench.ceilings import measure_ceilings
from packloop.bench.synthetic import shape_config


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("slots", type=int, nargs="+", help="of a micro-batch: packs x tokens a pack")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = shape_config(arguments.shape)
    for slots in arguments.slots:
        ceilings = measure_ceilings(config, slots, torch.bfloat16, device)
        write_row(sys.stdout, {"slots": slots, "ceilings": ceilings.model_dump(mode="json")})


if __name__ == "__main__":
    main()
