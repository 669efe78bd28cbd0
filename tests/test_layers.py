"""Imports point down, wings never import each other, each room imports few packages, nobody reads what is private."""

import ast
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
ROOT = CHECKOUT / "pruning_core"

FLOORS = [  # a room may import rooms of its own floor or lower; a room is a file or a folder, the deepest named here
    {"registry", "checkpoint", "latency", "integrations/when_imported"},
    {"options", "criteria", "schedules", "patterns", "selection", "report", "distillation"},
    {"limits"},
    {"graph/errors", "graph/inputs", "graph/wrappers"},
    {"graph/trace"},
    {"graph/plan"},
    {"graph/couple", "graph/cut", "graph/cut/configuration"},
    {"graph/graph", "graph/__init__"},
    {"sparse_format"},
    {"masks", "channels"},
    {"export", "integrations", "compat"},
    {"cli"},
    {"__init__", "__main__"},
]
APART = [{"masks", "channels"}, {"graph/couple", "graph/cut"}]
"""Rooms of one floor that do not know each other."""
PACKAGES = {"torch", "numpy", "pydantic", "yaml", "safetensors"}
MORE_PACKAGES = {
    "graph/couple": {"scipy"},
    "graph/cut/configuration": {"transformers"},  # where a model has such a configuration
    "report": {"matplotlib"},  # when a picture is drawn
    "sparse_format": {"tqdm"},
    "export": {"onnx", "onnxruntime", "onnxscript"},  # when they are needed
    "integrations": {"transformers", "huggingface_hub"},
    "cli": {"transformers"},
}
ROOMS = [room for floor in FLOORS for room in floor]


def room_of(path: str) -> str:
    """`graph/cut/slicing` is in the room `graph/cut`, `criteria` is one by itself."""
    parts = path.split("/")
    for length in range(len(parts), 0, -1):
        if "/".join(parts[:length]) in ROOMS:
            return "/".join(parts[:length])
    raise AssertionError(f"{path}: a new room; say on which floor it is")


def module_file(name: str) -> str:
    """`masks.pruning` -> `masks/pruning`; a package stands for its `__init__`."""
    path = name.replace(".", "/")
    return f"{path}/__init__".strip("/") if (ROOT / path).is_dir() else path


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            folder = CHECKOUT / node.module.replace(".", "/")
            for alias in node.names:  # `from pruning_core import checkpoint` names a module
                inner = (folder / f"{alias.name}.py").exists() or (folder / alias.name / "__init__.py").exists()
                found.append(f"{node.module}.{alias.name}" if inner else node.module)
    return found


def violations(files: dict[Path, list[str]]) -> list[str]:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path, names in files.items():
        here = room_of(path.relative_to(ROOT).with_suffix("").as_posix())
        for name in names:
            package, _, inner = name.partition(".")
            if package == "pruning_core":
                there = room_of(module_file(inner))
                apart = any(here in rooms and there in rooms and here != there for rooms in APART)
                if floor[there] > floor[here] or apart:
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
        ("criteria.py", "pruning_core.masks.pruning"),
        ("masks/groups.py", "pruning_core.channels.planner"),
        ("channels/slim.py", "pruning_core.masks.options"),
        ("graph/trace/rules/moves.py", "pruning_core.graph.cut.reference"),
        ("graph/couple/trial.py", "pruning_core.graph.cut.surgery"),
        ("graph/cut/surgery.py", "pruning_core.graph.couple.groups"),
        ("graph/cut/surgery.py", "pruning_core.graph"),
        ("sparse_format/packed.py", "pruning_core.masks.weight"),
        ("masks/weight.py", "pruning_core.compat"),
        ("masks/weight.py", "pruning_core"),
        ("criteria.py", "ultralytics"),
        ("masks/config.py", "transformers.pytorch_utils"),
        ("graph/cut/surgery.py", "scipy.sparse"),
        ("export/onnx_model.py", "pruning_core.cli.packing"),
        ("integrations/transformers/callback.py", "lightning"),
    ],
)
def test_the_guard_can_fail(file, name):
    assert violations({ROOT / file: [name]}) != []


def test_a_new_room_must_be_given_a_floor():
    with pytest.raises(AssertionError, match="novelty: a new room"):
        violations({ROOT / "novelty.py": []})


def test_modules_do_not_import_in_circles():
    graph = {}
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")
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
    apps = CHECKOUT / "apps"
    for path in apps.rglob("*.py"):
        here = path.relative_to(apps).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("apps."):
                    assert name.split(".")[1] in (here, "common"), f"{path} imports {name}"


# ---- the front door is enough ---------------------------------------------------------------------------------------

FACES = [
    *(CHECKOUT / "apps").rglob("*.py"),
    *(CHECKOUT / "benchmarks").glob("*.py"),
    *(ROOT / "integrations").rglob("*.py"),
]


def private_reads(source: str) -> list[str]:
    """`pruner._groups`, `pruning_core.masks.weight._x`: what a pruner or the core keeps for itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] in ("pruner", "pruning", "graph", "plan", "report") or owner.startswith("pc."):
                found.append(f"{owner}.{node.attr}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pruning_core"):
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("_")]
    return found


@pytest.mark.parametrize("path", FACES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_nothing_private_is_read(path):
    assert private_reads(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["pruner._groups[0].done", "run.pruner._clocks", "from pruning_core.masks.pruning import _known", "pc.x._y"],
)
def test_the_search_for_private_reads_can_fail(source):
    assert private_reads(source) != []
