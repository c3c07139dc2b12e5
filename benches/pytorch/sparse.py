"""A bilinear rotation per sample of (64, 14x14, 384), forward and backward: this crate beside PyTorch's grid_sample.

    cargo bench --bench sparse
    python benches/pytorch/sparse.py

Times PyTorch in this process with as many threads as RAYON_NUM_THREADS says (2 without it), runs the crate's benchmark
again with the same number, and prints one JSON line per comparison; exits with 1 if a ratio is above its goal.
Both sides build their sampling operator (PyTorch: affine_grid) in the time.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

THREADS = int(os.environ.get("RAYON_NUM_THREADS", "2"))
BATCH, SIDE, CHANNELS, GOAL = 64, 14, 384, 1.5
UNITS = {"ns": 1e-6, "µs": 1e-3, "us": 1e-3, "ms": 1.0, "s": 1e3}


def pytorch(mode, rounds=15):
    torch.manual_seed(0)
    x = torch.rand(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    cotangent = torch.rand_like(x)
    angle = torch.deg2rad(torch.linspace(-170, 170, BATCH))
    c, s, z = angle.cos(), angle.sin(), torch.zeros(BATCH)
    theta = torch.stack([torch.stack([c, -s, z], 1), torch.stack([s, c, z], 1)], 1)
    times = []
    for _ in range(rounds + 3):
        x.grad = None
        start = time.perf_counter()
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        y = F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)
        y.backward(cotangent)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def ours(name):
    """The middle of criterion's three figures, in ms."""
    command = ["cargo", "bench", "--bench", "sparse", "--", "--quick", f"ours, {name}, forward"]
    env = dict(os.environ, RAYON_NUM_THREADS=str(THREADS))
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    found = re.search(r"time:\s+\[\S+ \S+ (\S+) (\S+) \S+ \S+\]", out)
    if not found:
        sys.exit(f"no time in: {out}")
    return float(found[1]) * UNITS[found[2]]


torch.set_num_threads(THREADS)
missed = False
for name in ["bilinear", "bicubic"]:
    mine, other = ours(name), pytorch(name)
    ratio = mine / other
    # The goal is for four taps; sixteen are for the record.
    goal = GOAL if name == "bilinear" else None
    missed |= goal is not None and ratio > goal
    line = {
        "name": f"rotation per sample, {name}, forward + backward",
        "ours_ms": round(mine, 2),
        "other_ms": round(other, 2),
        "ratio": round(ratio, 3),
        "goal": goal,
    }
    print(json.dumps(line))
sys.exit(missed)
