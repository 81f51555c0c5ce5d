"""What each process of tests/test_ranks.py runs under torchrun: the jobs of a file, one after the other.

Arguments: a JSON list of jobs {name, config, resume, damage, stop}, and a directory for what each rank saw of each:
NAME.rankR.json. `damage` is a file of the finished job "whole", which is copied and that file broken before the job;
`stop` names the rank and the step at which that rank sends itself SIGTERM.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from small_job import TIMING_FIELDS

from packloop.config import parse_config
from packloop.engine.loop import train
from packloop.errors import InputError


def damaged_copy(whole: Path, copy: Path, file: str) -> None:
    shutil.copytree(whole, copy)
    broken = bytearray((copy / file).read_bytes())
    broken[len(broken) // 2] ^= 1
    (copy / file).write_bytes(broken)


def run(job: dict) -> dict:
    steps: list[dict] = []
    error, stopped_by = None, None

    def on_step(values: dict) -> None:
        steps.append({name: value for name, value in values.items() if name not in TIMING_FIELDS})
        if job["stop"] == {"rank": int(os.environ["RANK"]), "step": values["step"]}:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        stopped_by = train(parse_config(job["config"]), resume=job["resume"], on_step=on_step).stopped_by
    except InputError as failure:
        error = f"{type(failure).__name__}: {failure}"
    return {"steps": steps, "error": error, "stopped_by": stopped_by, "backend": torch.distributed.get_backend()}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if job["damage"]:
            if os.environ["RANK"] == "0":
                damaged_copy(out / "whole", out / job["name"], job["damage"])
            torch.distributed.barrier()
        result = run(job)
        (out / f"{job['name']}.rank{os.environ['RANK']}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
