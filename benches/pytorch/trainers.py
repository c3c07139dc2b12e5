"""Images per second of the trainers and of the same written plainly in PyTorch, by turns on one machine.

    cargo build --release --examples
    pip install torch
    python benches/pytorch/trainers.py                 # a Markdown table; every measurement as a JSON line beside it
    python benches/pytorch/trainers.py --rounds 5

Each round goes through all methods; within it PyTorch trains some steps, then the trainer of this repository makes a smoke
run (48 steps of 64 pictures). The table has medians over rounds. PyTorch is given random pictures: its side loads, crops
and jitters nothing, ours does. It uses `scaled_dot_product_attention` and the fused AdamW.
"""

import argparse
import copy
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn

DIM, DEPTH, HEADS, TOKENS, BATCH, POSED, LAYER, STEPS = 64, 4, 2, 49, 64, 8, 2, 48
MODES = {"SER": [], "λ = 0": ["--lambda", "0"], "baseline": ["--baseline"]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(
            nn.Linear(DIM, 2 * DIM), nn.GELU("tanh"), nn.Linear(2 * DIM, DIM)
        )

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, DIM))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Class embedding, and the tokens after block `LAYER`; the class token enters after block `cls_after`."""

    def __init__(self, cls_after):
        super().__init__()
        self.cls_after = cls_after
        self.patch = nn.Conv2d(1, DIM, 4, 4)
        self.register_buffer("positions", torch.randn(1, TOKENS, DIM))
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        for i, block in enumerate(self.blocks):
            if i == self.cls_after:
                x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
            x = block(x)
            if i + 1 == LAYER:
                tokens = x
        return self.norm(x[:, 0]), tokens


def mlp(*widths, last_norm):
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        layers.append(nn.Linear(a, b, bias=False))
        if i < len(widths) - 2:
            layers += [nn.BatchNorm1d(b), nn.ReLU()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(b, affine=False))
    return nn.Sequential(*layers)


class Ser(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(
            nn.LayerNorm(DIM),
            nn.Linear(DIM, 128, bias=False),
            nn.GELU("tanh"),
            nn.Linear(128, 128, bias=False),
        )

    def forward(self, tokens):
        return F.normalize(self.head(tokens[-POSED:]), dim=-1)


def contrast(q, k, turn, temperature=0.3):
    """NT-Xent in the paper's form, one direction; `turn` carries the tokens of `k` into the frame of `q`."""
    k = torch.gather(k, 1, turn[..., None].expand_as(k)).flatten(0, 1)
    q = q.flatten(0, 1)
    image = torch.arange(POSED).repeat_interleave(TOKENS)
    other = image[:, None] != torch.cat([image, image])[None]
    logits = (q @ torch.cat([q, k]).T / temperature).masked_fill(~other, -torch.inf)
    positive = (q * k).sum(1, keepdim=True) / temperature
    return (torch.logsumexp(torch.cat([positive, logits], 1), 1) - positive[:, 0]).mean()


def equivariance(ser, maps, key_ser, key_maps):
    turn = torch.stack([torch.randperm(TOKENS) for _ in range(POSED)])
    (q1, q2), (k1, k2) = map(ser, maps), map(key_ser, key_maps)
    return 0.5 * (contrast(q1, k2, turn) + contrast(q2, k1, turn))


@torch.no_grad()
def follow(target, source, momentum):
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)


class Moco:
    clip = None

    def __init__(self, ser, cls_after):
        self.ser = ser
        parts = [Vit(cls_after), mlp(DIM, 512, 512, DIM, last_norm=True), Ser() if ser else nn.Identity()]
        self.online, self.predict = nn.ModuleList(parts), mlp(DIM, 512, DIM, last_norm=True)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        self.parameters = [*self.online.parameters(), *self.predict.parameters()]

    def loss(self, x1, x2):
        follow(self.momentum, self.online, 0.95)
        encode, project, ser = self.online
        key_encode, key_project, key_ser = self.momentum
        # Both views in one pass; batch statistics of their own in the heads.
        q, maps = encode(torch.cat([x1, x2]))
        with torch.no_grad():
            k, key_maps = key_encode(torch.cat([x1, x2]))
            k1, k2 = (F.normalize(key_project(k)) for k in k.chunk(2))
        own = torch.arange(BATCH)
        q1, q2 = (F.normalize(self.predict(project(q))) for q in q.chunk(2))
        loss = 0.4 * (F.cross_entropy(q1 @ k2.T / 0.2, own) + F.cross_entropy(q2 @ k1.T / 0.2, own))
        if self.ser:
            loss = loss + equivariance(ser, maps.chunk(2), key_ser, key_maps.chunk(2))
        return loss


class Dino:
    clip = 1.0

    def __init__(self, ser, cls_after):
        self.ser = ser
        head = [mlp(DIM, 256, 256, DIM, last_norm=False), nn.Linear(DIM, 256, bias=False)]
        self.student = nn.ModuleList([Vit(cls_after), *head, Ser() if ser else nn.Identity()])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.center, self.parameters = torch.zeros(256), list(self.student.parameters())

    def run(self, net, x):
        y, tokens = net[0](x)
        scores = [F.linear(F.normalize(net[1](y)), F.normalize(net[2].weight)) for y in y.chunk(2)]
        return scores, tokens.chunk(2)

    def loss(self, x1, x2):
        x = torch.cat([x1, x2])
        with torch.no_grad():
            taught, key_maps = self.run(self.teacher, x)
            targets = [F.softmax((t - self.center) / 0.05, -1) for t in taught]
            self.center = 0.9 * self.center + 0.1 * torch.cat(taught).mean(0)
        learned, maps = self.run(self.student, x)
        logs = [F.log_softmax(s / 0.1, -1) for s in learned]
        cross = lambda p, q: -(p * q).sum(-1).mean()
        loss = 0.5 * (cross(targets[0], logs[1]) + cross(targets[1], logs[0]))
        if self.ser:
            loss = loss + equivariance(self.student[3], maps, self.teacher[3], key_maps)
        follow(self.teacher, self.student, 0.97)
        return loss


class Barlow:
    clip = None

    def __init__(self, ser, cls_after):
        self.ser = Ser() if ser else None
        self.net = nn.ModuleList([Vit(cls_after), mlp(DIM, 256, 256, 256, last_norm=False)])
        self.norm = nn.BatchNorm1d(256, affine=False)
        self.parameters = [*self.net.parameters(), *(self.ser.parameters() if ser else [])]

    def loss(self, x1, x2):
        y, maps = self.net[0](torch.cat([x1, x2]))
        z1, z2 = (self.norm(self.net[1](y)) for y in y.chunk(2))
        c = z1.T @ z2 / BATCH
        on = (1 - c.diagonal()).square().sum()
        loss = (on + 0.02 * (c.square().sum() - c.diagonal().square().sum())) * 10 / 256
        if self.ser:
            loss = loss + 0.3 * equivariance(self.ser, maps.chunk(2), self.ser, maps.chunk(2))
        return loss


class Torch:
    """A method in PyTorch, trained on random pictures."""

    def __init__(self, method, mode):
        # λ = 0 runs the same encoder as SER, without the loss.
        self.method = method(ser=mode == "SER", cls_after=0 if mode == "baseline" else LAYER)
        self.optimizer = torch.optim.AdamW(
            self.method.parameters, lr=2e-3, weight_decay=0.05, fused=True
        )
        self.pictures = [torch.randn(BATCH, 1, 28, 28) for _ in range(2)]

    def speed(self, steps):
        start = time.perf_counter()
        for _ in range(steps):
            loss = self.method.loss(*self.pictures)
            self.optimizer.zero_grad()
            loss.backward()
            if self.method.clip:
                nn.utils.clip_grad_norm_(self.method.parameters, self.method.clip)
            self.optimizer.step()
            loss.item()
        return steps * BATCH / (time.perf_counter() - start)


def ours(examples, name, mode):
    """Images per second and peak memory in MiB of a smoke run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [examples / name, "--smoke", "--brief", "--evaluate-every", "0", "--out", folder]
        subprocess.run([*command, *MODES[mode]], check=True, capture_output=True)
        result = json.loads((pathlib.Path(folder) / "result.json").read_text())
    return result["images_per_s"], result["peak_mib"]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--examples", type=pathlib.Path, default="target/release/examples")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--json", type=pathlib.Path, default="target/pytorch.jsonl")
    args = args.parse_args()
    torch.set_num_threads(os.cpu_count())
    print("PyTorch", torch.__version__, torch.backends.cpu.get_cpu_capability(), file=sys.stderr)

    methods = {"moco_v3": Moco, "dino": Dino, "barlow_twins": Barlow}
    cells = [(name, mode) for name in methods for mode in MODES]
    models = {(name, mode): Torch(methods[name], mode) for name, mode in cells}
    for model in models.values():
        model.speed(10)  # warms up
    seen = {cell: [] for cell in cells}
    with args.json.open("w") as lines:
        for turn in range(args.rounds):
            for name, mode in cells:
                theirs = models[name, mode].speed(STEPS)
                speed, peak = ours(args.examples, name, mode)
                seen[name, mode].append((speed, theirs, speed / theirs, peak))
                line = {"round": turn, "method": name, "mode": mode, "images_per_s": speed, "pytorch": theirs, "peak_mib": peak}
                print(json.dumps(line, ensure_ascii=False), file=lines, flush=True)
                print(f"{turn + 1}/{args.rounds} {name} {mode}: {speed:.0f}, PyTorch {theirs:.0f}", file=sys.stderr)
    print("| method | mode | images/s | PyTorch | ratio | lowest, highest ratio | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for (name, mode), rows in seen.items():
        speed, theirs, ratio, peak = (statistics.median(column) for column in zip(*rows))
        ratios = [row[2] for row in rows]
        print(
            f"| {name} | {mode} | {speed:.0f} | {theirs:.0f} | {ratio:.2f} "
            f"| {min(ratios):.2f}, {max(ratios):.2f} | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
