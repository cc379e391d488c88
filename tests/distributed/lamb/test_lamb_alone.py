"""train/lamb copied alone under another name: it trains under DeepSpeed's ZeRO-2 without this project."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.distributed.ranks.harness import rank_environment
from tests.paths import ROOT
from train.distributed.rendezvous import free_port

SCRIPT = """
import importlib.util
import os
import torch
from lamb import Lamb

assert importlib.util.find_spec("train") is None, "the project must not be reachable"
torch.manual_seed(0)
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.LayerNorm(13), torch.nn.Linear(13, 5))

    def forward(self, gradients):  # a loss whose gradients are the given ones
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients))


model = Model()
optimizer = Lamb(model.named_parameters(), lr=0.01)
# Of few bits, so that means over the ranks are exact.
steps = [[(torch.randn(p.shape) * 256).round() / 256 for p in model.parameters()] for _ in range(3)]
if world_size == 1:
    for gradients in steps:
        for p, g in zip(model.parameters(), gradients):
            p.grad = g
        optimizer.step()
else:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute otherwise
    torch.distributed.init_process_group("gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.bind(engine)
    for gradients in steps:
        # Each element's gradient comes from one rank alone.
        mine = [g * (torch.arange(g.numel()).view(g.shape) % world_size == rank) * world_size for g in gradients]
        engine.backward(engine(mine))
        engine.step()
    assert optimizer.param_groups[0]["params"][0].numel() < sum(p.numel() for p in model.parameters())
result = {"parameters": [p.detach().clone() for p in model.parameters()], "ratios": optimizer.trust_ratios}
torch.save(result, f"{world_size}-{rank}.pt")
if world_size > 1:
    torch.distributed.destroy_process_group()
"""


def test_the_folder_alone_trains_under_zero_2(tmp_path: Path) -> None:
    """On two gloo ranks, bit for bit as in one process: the same kernel over other partitions."""
    shutil.copytree(ROOT / "train" / "lamb", tmp_path / "lamb", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "train_alone.py").write_text(SCRIPT)
    port = free_port()
    environments = [rank_environment(rank, size, port) for size, rank in ((1, 0), (2, 0), (2, 1))]
    ranks = []
    for environment in environments:
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "train_alone.py"]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(outputs)
    alone, *cut = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(set(alone["ratios"].tolist())) == 3  # of two matrices, and the 1 of biases and norms
    for rank in cut:
        assert torch.equal(rank["ratios"], alone["ratios"])
        for ours, whole in zip(rank["parameters"], alone["parameters"], strict=True):
            assert torch.equal(ours, whole)
