"""Run by the Python that a wheel alone was installed into: what is in the wheel, and does it prune and slim there.

python -I tests/support/wheel_smoke.py .wheel/pruning_core-*.whl
"""

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import nn

import pruning_core as pc

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("transformers", "accelerate", "onnx", "onnxruntime", "matplotlib", "ultralytics", "apps", "data", "tests")
SHIPPED = (".py", ".pyi", ".typed", ".md")


def require(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"smoke: {what}")


def check_wheel(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "pruning_core").rglob("*") if path.suffix in SHIPPED)
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    require(names == expected, f"{wheel.name}: is not pruning_core, differs in {sorted(names ^ expected)}")


def check_environment() -> None:
    home = Path(pc.__file__).resolve()
    installed = Path(sysconfig.get_path("purelib")).resolve()
    require(home.is_relative_to(installed), f"pruning_core: comes from {home}, not from {installed}")
    require(version("pruning_core") == pc.__version__, f"version: metadata says {version('pruning_core')}")
    present = [name for name in ABSENT if find_spec(name) is not None]
    require(not present, f"environment: is not bare, has {present}")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def prune(example: torch.Tensor) -> nn.Module:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = {"target_sparsity": 0.8, "pattern": "1x1", "start_step": 1, "end_step": 4}
    with pc.Pruning(config).attach(model, optimizer) as pruner:
        for _ in range(6):
            optimizer.zero_grad()
            model(example).square().mean().backward()
            optimizer.step()
    weights = [part.weight for part in model if isinstance(part, nn.Conv2d | nn.Linear)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    require(zeros == round(0.8 * total), f"target_sparsity: asked 0.8 of {total}, got {zeros} zeros")
    require(set(pruner.masks()) == {"0.weight", "3.weight", "7.weight"}, f"masks: got {sorted(pruner.masks())}")
    return model


def pack(model: nn.Module) -> str:
    """Writes a packed file, reads it back, and has the console script look at it."""
    script = Path(sysconfig.get_path("scripts")) / "pruning-core"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.sparse.safetensors")
        pc.save_sparse(model, file)
        state = pc.load_sparse(file)
        require(state.keys() == model.state_dict().keys(), f"load_sparse: got {sorted(state)}")
        same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        require(same, "load_sparse: differs from what was saved")
        seen = subprocess.run([script, "inspect", file], capture_output=True, text=True, check=False, cwd=folder)
    require(seen.returncode == 0 and "0.weight" in seen.stdout, f"pruning-core inspect: {seen.stdout}{seen.stderr}")
    return seen.stdout.strip().splitlines()[-1]


def main(wheel: str) -> None:
    check_wheel(Path(wheel))
    check_environment()
    example = torch.randn(4, 3, 16, 16)
    summary = pack(prune(example))
    model = net().eval()
    before = sum(p.numel() for p in model.parameters())
    pc.slim(model, {"macs": 0.5}, example)
    after = sum(p.numel() for p in model.parameters())
    require(after < before and model(example).shape == (4, 10), f"slim: {before} parameters became {after}")
    print(f"{Path(wheel).name}: {summary}; slimmed from {before:,} to {after:,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
