"""The rows of `cargo bench --bench ratios` whose other side is PyTorch: both sides by turns on this machine.

    cargo bench --bench ratios --no-run
    pip install torch
    python benches/pytorch/kernels.py               # a table
    python benches/pytorch/kernels.py --json        # JSON lines like those of the bench

With as many threads as RAYON_NUM_THREADS says, 2 without it. Each round asks the bench for three repetitions of ours, then times three of PyTorch; medians over the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F

THREADS = int(os.environ.get("RAYON_NUM_THREADS", "2"))


def nt_xent(shape, symmetric):
    """The paper's form as one writes it; forward and backward."""
    images, tokens, width = shape
    z, zp = (torch.randn(images * tokens, width, requires_grad=True) for _ in range(2))
    image = torch.arange(images).repeat_interleave(tokens)
    other = image[:, None] != torch.cat([image, image])[None]

    def one(q, k):
        logits = (q @ torch.cat([q, k]).T / 0.3).masked_fill(~other, -torch.inf)
        positive = (q * k).sum(1, keepdim=True) / 0.3
        return (torch.logsumexp(torch.cat([positive, logits], 1), 1) - positive[:, 0]).mean()

    def step():
        z.grad = zp.grad = None
        a, b = F.normalize(z, dim=1), F.normalize(zp, dim=1)
        (0.5 * (one(a, b) + one(b, a)) if symmetric else one(a, b)).backward()

    return step


def interpolate(mode):
    """Tokens (64, 14x14, 384) to 12x16, forward and backward; tokens are channels-last maps."""
    x = torch.randn(64, 14, 14, 384).permute(0, 3, 1, 2).requires_grad_()
    ones = torch.ones(64, 12, 16, 384).permute(0, 3, 1, 2)

    def step():
        x.grad = None
        F.interpolate(x, size=(12, 16), mode=mode, align_corners=False).backward(ones)

    return step


def interpolate_forward(mode):
    """The forward pass alone."""
    x = torch.randn(64, 14, 14, 384).permute(0, 3, 1, 2)

    def step():
        with torch.no_grad():
            F.interpolate(x, size=(12, 16), mode=mode, align_corners=False)

    return step


ROWS = [
    # name, the bench's row that times ours, goal, PyTorch
    ("nt_xent (16, 196, 512), one direction / PyTorch", "nt_xent (16, 196, 512), three products", 0.60, nt_xent((16, 196, 512), False)),
    ("nt_xent (16, 196, 512), both directions / PyTorch", "nt_xent (16, 196, 512), both directions / one", 0.40, nt_xent((16, 196, 512), True)),
    ("nt_xent (64, 49, 128), one direction / PyTorch", "nt_xent (64, 49, 128), three products", 0.33, nt_xent((64, 49, 128), False)),
    ("nt_xent (64, 49, 128), both directions / PyTorch", "nt_xent (64, 49, 128), both directions / one", 0.20, nt_xent((64, 49, 128), True)),
    ("bilinear 14x14 to 12x16 of (64, 196, 384), forward alone / PyTorch", "bilinear 14x14 to 12x16 of (64, 196, 384), forward alone / copy", 1.0, interpolate_forward("bilinear")),
    ("bilinear 14x14 to 12x16 of (64, 196, 384), forward + backward / PyTorch", "bilinear 14x14 to 12x16 of (64, 196, 384), forward + backward / copy", None, interpolate("bilinear")),
    ("bicubic 14x14 to 12x16 of (64, 196, 384), forward + backward / PyTorch", "bicubic 14x14 to 12x16 of (64, 196, 384), forward + backward / copy", 0.15, interpolate("bicubic")),
]


def milliseconds(step):
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def ours(bench, row):
    """Milliseconds of our side of a row of the bench, over one short run."""
    command = [bench, "--json", "--rounds", "3", "--only", row]
    env = {**os.environ, "RAYON_NUM_THREADS": str(THREADS)}
    line = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    return json.loads(line)["ours_ms"]


def newest_bench():
    found = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", "target")).glob("release/deps/ratios-*")
    programs = [path for path in found if not path.suffix and os.access(path, os.X_OK)]
    if not programs:
        raise SystemExit("no bench found: run `cargo bench --bench ratios --no-run` first")
    return max(programs, key=lambda path: path.stat().st_mtime)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--json", action="store_true")
    args.add_argument("--rounds", type=int, default=5)
    args = args.parse_args()
    torch.set_num_threads(THREADS)
    bench = newest_bench()
    for name, row, goal, step in ROWS:
        for _ in range(3):
            step()
        rounds = [
            (ours(bench, row), statistics.median(milliseconds(step) for _ in range(3)))
            for _ in range(args.rounds)
        ]
        own, other = (statistics.median(side) for side in zip(*rounds))
        ratio = statistics.median(a / b for a, b in rounds)
        if args.json:
            line = {"name": name, "ours_ms": own, "other_ms": other, "ratio": ratio, "goal": goal}
            print(json.dumps(line), flush=True)
        else:
            print(f"{name:<76} {own:>9.2f} {other:>9.2f} {ratio:>7.3f} {goal if goal else '-':>5}", flush=True)


if __name__ == "__main__":
    main()
