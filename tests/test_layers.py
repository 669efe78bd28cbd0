"""Imports point down, wings never import each other, and the core imports few packages."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pruning_core"

FLOORS = [  # a module may import modules of its own floor's number or lower
    {
        "registry",
        "yaml_file",
        "regularizers",
        "budget",
        "selection",
        "checkpoint",
        "hooks",
        "distillation",
        "cost",
        "when_imported",
    },
    {"patterns", "criteria", "schedules", "report"},
    {"options", "config", "sharding"},
    {"graph"},
    {"masks", "channels", "supernet"},
    {"export"},
    {"__init__", "__main__"},
    {"trainer_callback"},  # above __init__: `import pruning_core` never imports transformers
]
WINGS = {"masks", "channels", "supernet"}
PACKAGES = {"torch", "numpy", "pydantic", "yaml", "safetensors", "matplotlib", "scipy"}
MORE_PACKAGES = {
    "trainer_callback": {"transformers"},
    "export": {"tqdm", "transformers", "huggingface_hub", "onnx", "onnxruntime", "onnxscript"},  # when they are needed
}


def room(path: Path) -> str:
    """`masks/driver.py` lives in the room `masks`, `budget.py` in `budget`."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            folder = ROOT.parent / node.module.replace(".", "/")
            for alias in node.names:  # `from pruning_core import checkpoint` names a module
                inner = node.module == "pruning_core" or (folder / f"{alias.name}.py").exists()
                found.append(f"{node.module}.{alias.name}" if inner else node.module)
    return found


def violations(files: dict[Path, list[str]]) -> list[str]:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path, names in files.items():
        here = room(path)
        assert here in floor, f"{here}: a new room; say on which floor it is"
        for name in names:
            package, _, inner = name.partition(".")
            if package == "pruning_core":
                there = inner.split(".")[0]
                if floor[there] > floor[here] or (here in WINGS and there in WINGS and here != there):
                    wrong.append(f"{here} imports {there}")
            elif package not in PACKAGES | MORE_PACKAGES.get(here, set()) | sys.stdlib_module_names:
                wrong.append(f"{here} imports {package}")
    return wrong


def test_imports_point_down():
    files = {path: imports(path) for path in ROOT.rglob("*.py")}
    assert len(files) > 20
    assert violations(files) == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("budget.py", "pruning_core.masks.pruning"),
        ("masks/basic.py", "pruning_core.channels.plan"),
        ("criteria.py", "ultralytics"),
        ("config.py", "transformers.pytorch_utils"),
        ("patterns.py", "pruning_core.masks.config"),
        ("__init__.py", "pruning_core.integrations.transformers.callback"),
        ("trainer_callback.py", "lightning"),
    ],
)
def test_the_guard_can_fail(file, name):
    assert violations({ROOT / file: [name]}) != []


def test_modules_of_one_floor_do_not_import_in_circles():
    graph = {}
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in imports(path) if name.startswith("pruning_core")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for each in graph.get(module, ()):
                visit(each, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_apps_stand_apart():
    """What two apps share lies in `apps/common`, which knows none of them; no app imports another."""
    apps = ROOT.parent / "apps"
    for path in apps.rglob("*.py"):
        here = path.relative_to(apps).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("apps."):
                    assert name.split(".")[1] in (here, "common"), f"{path} imports {name}"
