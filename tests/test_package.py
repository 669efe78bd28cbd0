"""The front door: every public name, loaded when it is first used; and how the package and the apps are installed."""

import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

import pruning_core as pc
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code, *, cwd=ROOT, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pc.__all__)
def test_a_public_name(name):
    found = getattr(pc, name)
    home = pc._HOMES.get(name, "pruning_core")
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__module__ == home  # the list says where it is written, not where it is passed on
        assert found.__name__ == name
    elif inspect.ismodule(found):
        assert found.__name__ == f"{home}.{name}"


def test_importing_costs_what_is_used():
    loaded = "print(sorted({'torch', 'pydantic', 'transformers', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)))"
    assert python(f"import sys, pruning_core; {loaded}") == "[]"
    code = "import sys, pruning_core as pc; pc.Pruning, pc.slim, pc.save_sparse, pc.export_onnx"
    assert (
        python(f"{code}; print({{'transformers', 'matplotlib', 'onnx', 'ultralytics'}} & set(sys.modules))") == "set()"
    )


def test_star_and_completion():
    code = "from pruning_core import *; import pruning_core as pc; print(set(pc.__all__) - set(globals()))"
    assert python(code) == "set()"
    assert set(pc.__all__) <= set(dir(pc))
    assert len(pc.__all__) == len(set(pc.__all__)) > 45


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"^module 'pruning_core' has no attribute 'slimm'"):
        pc.slimm  # noqa: B018
    assert not hasattr(pc, "shapes")


def test_type_checkers_see_the_names(tmp_path):
    """``py.typed`` is there, and the stub is read by mypy: a wrong argument is found, a right one is not."""
    assert (ROOT / "pruning_core/py.typed").exists()
    (tmp_path / "user.py").write_text(
        "import pruning_core as pc\nreveal_type(pc.slim)\npc.Pruning(3, 4, 5, 6, 7, 8, 9)\npc.slimm\n"
    )
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent"]
    command += ["--config-file=", f"--cache-dir={tmp_path}/cache", str(tmp_path / "user.py")]
    said = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False
    ).stdout
    assert re.search(r'user.py:2: note: Revealed type is "def \(model: .*Module, budget: ', said), said
    assert "user.py:3: error: Too many" in said
    assert 'user.py:4: error: Module has no attribute "slimm"' in said


# ---- version, extras, script ----------------------------------------------------------------------------------------


def test_the_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pc.__version__)
    assert metadata.version("pruning_core") == pc.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert f"\n## {pc.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def bounds(lines):
    wanted = (re.split(r"[ #;]", line.strip())[0] for line in lines)
    return dict(re.fullmatch(r"([\w-]+)(.*)", each).groups() for each in wanted if re.match(r"\w", each))


def test_bounds_are_those_of_the_requirements():
    project = PROJECT["project"]
    pinned = bounds((ROOT / "requirements.txt").read_text().splitlines())
    extras = project["optional-dependencies"]
    assert set(extras) == {"transformers", "onnx", "plot", "yolo", "all"}
    wanted = [*project["dependencies"], *(each for name in extras if name != "all" for each in extras[name])]
    assert bounds(wanted).items() <= pinned.items()
    assert extras["all"] == ["pruning_core[transformers,onnx,plot,yolo]"]


def test_the_script_has_the_verbs_of_the_module(capsys):
    (entry,) = metadata.entry_points(group="console_scripts", name="pruning-core")
    with pytest.raises(SystemExit):
        entry.load()(["--help"])
    as_script = capsys.readouterr().out
    as_module = subprocess.run(
        [sys.executable, "-m", "pruning_core", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    verbs = re.search(r"\{([\w,]+)\}", as_script)[1].split(",")
    assert set(verbs) >= {"inspect", "export", "verify", "unpack", "slim"}
    assert re.search(r"\{([\w,]+)\}", as_module)[1].split(",") == verbs


# ---- the apps are found from anywhere -------------------------------------------------------------------------------


SCRIPTS = [
    "apps/quickstart/train_prune.py",
    "apps/text_classification/train_prune.py",
    "apps/qa/train_prune.py",
    "apps/yolov5/train_prune.py",
    "apps/yolov5/export.py",
    "apps/yolov5/slim.py",
    "data/sentences.py",
    "data/questions.py",
    "data/shapes_detection.py",
]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_as_a_file_and_as_a_module_from_another_folder(script, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    module = script.removesuffix(".py").replace("/", ".")
    for command in ([str(ROOT / script)], ["-m", module]):
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage:")


def test_nothing_changes_the_path_of_modules():
    for path in [*ROOT.glob("apps/**/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert "sys.path" not in path.read_text(), path


def test_older_names_have_a_place():
    for name in ("neural_compressor", "sensetime", "torch_ao"):
        assert getattr(pc.compat, name) is importlib.import_module(f"pruning_core.compat.{name}")
    with pytest.raises(AttributeError, match=r"^module 'pruning_core.compat' has no attribute 'nncf'"):
        pc.compat.nncf  # noqa: B018
