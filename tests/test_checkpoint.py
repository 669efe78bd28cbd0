"""Checkpoints: what goes in comes out, nothing runs, and a kill leaves the old file or the new one."""

import io
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pruning_core import CheckpointError, checkpoint
from tests.support import ROOT


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.layout != b.layout:
            return False
        return a.shape == b.shape and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


# ---- round trip ---------------------------------------------------------------------------------------------------

NESTED = {
    "model": {"weight": torch.randn(3, 4), "bias": torch.zeros(0), "scalar": torch.tensor(3)},
    "kinds": [
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.float16),
        torch.ones(2, dtype=torch.float64),
        torch.tensor([True, False]),
        torch.tensor([1, 255], dtype=torch.uint8),
        torch.tensor([1j]),
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    "step": 7,
    "big": 2**100,
    "rate": 1e-30,
    "odd": [float("inf"), -float("inf"), -0.0],
    "name": "é\n\0",
    "bytes": b"\x00\xff",
    "complex": 1 + 2j,
    "none": None,
    "flags": (True, False),
    "deep": [[[[{"a": ({"b": []}, ())}]]]],
    5: "integer key",
    True: "bool key",
    2.5: "float key",
    None: "no key",
    "": {},
}


def test_round_trip(tmp_path):
    checkpoint.save(NESTED, tmp_path / "a.pt")
    assert same(checkpoint.load(tmp_path / "a.pt"), NESTED)
    assert same(checkpoint.load(str(tmp_path / "a.pt")), NESTED)
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), NESTED)
    assert leftovers(tmp_path) == []


def test_sparse_tensors_come_back_without_a_warning(tmp_path):
    state = {"coo": torch.eye(3).to_sparse()}
    checkpoint.save(state, tmp_path / "a.pt")
    assert same(checkpoint.load(tmp_path / "a.pt"), state)


def test_nan_comes_back(tmp_path):
    checkpoint.save({"a": float("nan"), "b": torch.tensor([float("nan")])}, tmp_path / "a.pt")
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["a"] != loaded["a"]
    assert loaded["b"].isnan().all()


def test_models_optimizers_and_schedulers_come_back(tmp_path):
    def parts():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    model, optimizer, scheduler = parts()
    for _ in range(3):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    checkpoint.save(state, tmp_path / "a.pt")
    loaded = checkpoint.load(tmp_path / "a.pt")
    model2, optimizer2, scheduler2 = parts()
    model2.load_state_dict(loaded["model"])
    optimizer2.load_state_dict(loaded["optimizer"])
    scheduler2.load_state_dict(loaded["scheduler"])
    assert same(dict(model2.state_dict()), dict(model.state_dict()))
    assert same(optimizer2.state_dict(), optimizer.state_dict())
    assert scheduler2.get_last_lr() == scheduler.get_last_lr()


def test_tied_tensors_stay_tied(tmp_path):
    weight = torch.randn(3, 3)
    checkpoint.save({"a": weight, "b": weight, "row": weight[1]}, tmp_path / "a.pt")
    loaded = checkpoint.load(tmp_path / "a.pt")
    loaded["a"].zero_()
    assert not loaded["b"].any()
    assert not loaded["row"].any()


def test_gradients_and_graphs_stay_behind(tmp_path):
    parameter = nn.Parameter(torch.ones(2))
    checkpoint.save({"leaf": parameter, "result": parameter * 2}, tmp_path / "a.pt")
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert same(loaded, {"leaf": torch.ones(2), "result": torch.full((2,), 2.0)})
    assert not loaded["leaf"].requires_grad and not loaded["result"].requires_grad
    assert parameter.requires_grad


@pytest.mark.parametrize(
    "value, plain",
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(-3), -3),
        (np.uint8(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.complex64(1j), 1j),
        (OrderedDict(a=1), {"a": 1}),
        (torch.Size([2, 3]), (2, 3)),
        (namedtuple("Pair", "x y")(1, 2), (1, 2)),
        ([np.int64(1), (np.float32(2),)], [1, (2.0,)]),
        (nn.Buffer(torch.ones(2)), torch.ones(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_becomes_plain(tmp_path, value, plain):
    checkpoint.save({"a": value}, tmp_path / "a.pt")
    assert same(checkpoint.load(tmp_path / "a.pt"), {"a": plain})


def test_the_callers_state_is_not_changed(tmp_path):
    state = {"a": [np.float64(1), OrderedDict(b=torch.ones(1))]}
    checkpoint.save(state, tmp_path / "a.pt")
    assert type(state["a"][0]) is np.float64
    assert type(state["a"][1]) is OrderedDict


def test_folders_are_made(tmp_path):
    checkpoint.save({"a": 1}, tmp_path / "runs" / "7" / "last.pt")
    assert checkpoint.load(tmp_path / "runs" / "7" / "last.pt") == {"a": 1}


def test_map_location(tmp_path):
    checkpoint.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert checkpoint.load(tmp_path / "a.pt", map_location="meta")["a"].is_meta
    assert checkpoint.load(tmp_path / "a.pt", map_location=torch.device("cpu"))["a"].device.type == "cpu"


# ---- what is not saved --------------------------------------------------------------------------------------------


class Options:
    pass


class MyTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "state, where, kind",
    [
        ({"a": nn.Linear(1, 1)}, "['a']", "Linear"),
        ({"a": {"b": [1, {"c": (Options(),)}]}}, "['a']['b'][1]['c'][0]", "Options"),
        ({"a": {1}}, "['a']", "set"),
        ({"a": np.ones(2)}, "['a']", "ndarray"),
        ({"a": [torch.float32]}, "['a'][0]", "dtype"),
        ({"a": torch.device("cpu")}, "['a']", "device"),
        ({"a": Path("x")}, "['a']", "PosixPath"),
        ({5: print}, "[5]", "builtin_function_or_method"),
        ({"a": torch.ones(1).as_subclass(MyTensor)}, "['a']", "MyTensor"),
        ({"a": nn.LazyLinear(1).weight}, "['a']", "UninitializedParameter"),
        ({"a": np.longdouble(1)}, "['a']", "longdouble"),
        ({"a": np.datetime64("2024-01-01")}, "['a']", "date"),
        ({"a": signal.SIGTERM}, "['a']", "Signals"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_objects_are_refused_with_their_place(tmp_path, state, where, kind):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(state, tmp_path / "a.pt")
    assert str(caught.value) == (
        f"checkpoint{where}: only tensors and plain data are saved, got {kind}; "
        "save its state_dict, a number, a string, a list or a dict"
    )
    assert list(tmp_path.iterdir()) == []


def test_keys_are_plain_data(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^checkpoint\['a'\]: keys must be plain data, got \(1, 2\); use a string$"
    ):
        checkpoint.save({"a": {(1, 2): 3}}, tmp_path / "a.pt")


@pytest.mark.parametrize("state", [[1], torch.ones(1), nn.Linear(1, 1), None])
def test_a_checkpoint_is_a_dict(tmp_path, state):
    kind = type(state).__name__
    with pytest.raises(
        CheckpointError, match=f"^checkpoint: must be a dict, got {kind}; save state dicts, not objects$"
    ):
        checkpoint.save(state, tmp_path / "a.pt")


def test_a_dict_that_holds_itself(tmp_path):
    state: dict = {"a": [1]}
    state["a"].append(state)
    with pytest.raises(
        CheckpointError, match=r"^checkpoint: is nested too deep, or holds itself; save a flatter dict$"
    ):
        checkpoint.save(state, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_can_be_loaded_however_deep(tmp_path):
    """Whatever ``save`` accepts, ``load`` reads."""
    state: dict = {}
    for depth in range(1, 600):
        state = {"a": [state]}
        if depth % 50:
            continue
        try:
            checkpoint.save(state, tmp_path / "a.pt")
        except CheckpointError:
            break
        assert checkpoint.load(tmp_path / "a.pt") == state
    assert depth > 100


# ---- random generators --------------------------------------------------------------------------------------------


def draws() -> list[float]:
    values = [random.random(), random.gauss(0, 1), random.randrange(10**9)]
    values += [np.random.rand(), np.random.randn(), float(np.random.permutation(1000)[0])]
    return [*values, torch.rand(()).item(), torch.randn(()).item(), float(torch.randperm(1000)[0])]


@pytest.mark.parametrize("before", [0, 1, 700])
def test_random_sequences_continue(tmp_path, before):
    """An odd number of normal draws leaves a second one in store, in Python and in NumPy: it comes back too."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    for _ in range(before):
        draws()
    checkpoint.save({"rng": checkpoint.rng_state()}, tmp_path / "a.pt")
    expected = [draws() for _ in range(400)]
    assert draws() not in expected
    random.seed(4)
    np.random.seed(4)
    torch.manual_seed(4)
    checkpoint.load_rng_state(checkpoint.load(tmp_path / "a.pt")["rng"])
    assert [draws() for _ in range(400)] == expected


def test_reading_the_generators_draws_nothing():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = draws()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    checkpoint.load_rng_state(checkpoint.rng_state())
    assert draws() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_generators_of_devices_that_are_not_here():
    state = {**checkpoint.rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 2}
    with pytest.raises(CheckpointError, match=r"^rng_state: holds 2 CUDA generators, got 0 devices$"):
        checkpoint.load_rng_state(state)


# ---- what is not loaded -------------------------------------------------------------------------------------------


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def zipped(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def legacy(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < len(str(path)) + 200
    assert "weights_only` set to `False" not in text  # torch's advice to switch the safety off
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("form", [zipped, legacy, pickle.dumps, lambda state: pickle.dumps(state, protocol=2)])
def test_a_pickle_with_code_does_not_run(tmp_path, form):
    trace = tmp_path / "owned"
    path = tmp_path / "a.pt"
    path.write_bytes(form({"model": {"weight": torch.ones(1)}, "x": Evil(trace)}))
    refused(path)
    assert not trace.exists()
    if form in (zipped, legacy):
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())  # noqa: S301
    assert trace.exists()  # the gun was loaded


@pytest.mark.parametrize("form", [zipped, legacy])
def test_an_object_is_named(tmp_path, form):
    path = tmp_path / "a.pt"
    path.write_bytes(form({"a": Evil(tmp_path / "owned")}))
    expected = f"holds an object, {os.mkdir.__module__}.mkdir, and was not loaded; save state dicts, not objects"
    assert refused(path) == expected
    path.write_bytes(form(nn.Linear(1, 1)))
    assert refused(path).startswith("holds an object, torch.nn.modules.linear.Linear, and was not loaded; ")


@pytest.mark.parametrize("form", [zipped, legacy])
def test_what_others_allow_is_not_loaded(tmp_path, form):
    path = tmp_path / "a.pt"
    path.write_bytes(form({"model": nn.Linear(1, 1)}))
    with torch.serialization.safe_globals([nn.Linear, Evil]):
        allowed = set(torch.serialization.get_safe_globals())
        assert refused(path).startswith("holds an object, torch.nn.modules.linear.Linear, and was not loaded; ")
        assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("state", [[1], torch.ones(1), 5])
def test_a_file_without_a_dict(tmp_path, state):
    path = tmp_path / "a.pt"
    path.write_bytes(zipped(state))
    assert refused(path) == f"must hold a dict, got {type(state).__name__}; save state dicts"


def test_torchscript(tmp_path):
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), path)
    assert "TorchScript archives" in refused(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"\0" * 10_000,
        b"hello world\n" * 100,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02.",
        b"\x80\x02}.",
        b"\x80\x05N.",
        bytes(range(256)) * 20,
        b"pattern: 4x1\n",
        pickle.dumps({"a": 1}),
    ],
    ids=range(11),
)
def test_garbage(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert damaged(refused(path))


def damaged(text: str) -> bool:
    return text.startswith("not a readable checkpoint (") and text.endswith("); it may be damaged")


def test_another_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert damaged(refused(tmp_path / "a.pt"))


@pytest.mark.parametrize("form", [zipped, legacy])
def test_every_truncation_is_refused(tmp_path, form):
    whole = form({"model": {"weight": torch.ones(30, 3)}, "list": [1, "x", None]})
    path = tmp_path / "a.pt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole)
    assert same(checkpoint.load(path)["list"], [1, "x", None])


@pytest.mark.parametrize("form", [zipped, legacy])
def test_damaged_files_end_in_one_kind_of_error(tmp_path, form):
    """IndexError, struct.error, AssertionError, UserWarning ...: torch.load knows them all, our callers one."""
    whole = form({"model": {"weight": torch.ones(30, 3)}, "list": [1, "x", None]})
    path = tmp_path / "a.pt"
    chance = random.Random(0)
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(data))
        try:
            assert isinstance(checkpoint.load(path), dict)
            outcomes.add("loaded")
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def test_a_storage_larger_than_the_file(tmp_path):
    """The old format declares sizes in the pickle; a lie ends in an error, not in memory."""
    whole = legacy({"a": torch.ones(1000)})
    lie = whole.replace(struct.pack("<H", 1000), struct.pack("<H", 60_000))
    assert lie != whole
    path = tmp_path / "a.pt"
    path.write_bytes(lie)
    refused(path)


def test_missing_file(tmp_path):
    assert refused(tmp_path / "a.pt") == "no such file; check the path of the checkpoint"


def test_folder(tmp_path):
    assert refused(tmp_path) == "is a folder; give the file inside it"


def test_a_file_below_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert refused(tmp_path / "a" / "b.pt") == "cannot be read (Not a directory)"


def test_a_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)


# ---- atomicity ----------------------------------------------------------------------------------------------------


class Interruption(BaseException):
    """As KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("error", [OSError("no space left on device"), Interruption()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize("before", [None, {"version": 1}], ids=["first", "second"])
def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path, error, before):
    path = tmp_path / "a.pt"
    if before:
        checkpoint.save(before, path)
    seen = []

    def write(file):
        file.write(b"half of it")
        file.flush()
        seen.extend(leftovers(tmp_path))
        raise error

    with pytest.raises(type(error)):
        checkpoint.write_atomically(path, write)
    assert len(seen) == 1  # there was a temporary file, beside the target
    assert [p.name for p in tmp_path.iterdir()] == (["a.pt"] if before else [])
    if before:
        assert checkpoint.load(path) == before


def test_an_error_in_torch_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint.save({"version": 1}, path)

    def fails(state, file):
        file.write(b"PK\x03\x04")
        raise RuntimeError("in the middle")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        checkpoint.save({"version": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"version": 1}
    assert leftovers(tmp_path) == []


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder."""
    order = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(handle):
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"file of {os.fstat(handle).st_size}")
        fsync(handle)

    def spy_replace(self, target):
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    checkpoint.write_atomically(tmp_path / "a", lambda file: file.write(b"12345"))
    assert order == ["file of 5", "rename", "folder"]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        checkpoint.save({"a": 1}, tmp_path / "a.pt")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0, 0o666)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        checkpoint.save({"a": 1}, tmp_path / "a.pt")
        (tmp_path / "plain").write_bytes(b"")
        assert os.umask(umask) == umask  # asking for the umask did not change it
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == mode


def test_a_symbolic_link_is_replaced_by_the_file(tmp_path):
    """``last.pt -> epoch3.pt``: the save makes last.pt a file of its own, and epoch3.pt stays what it was."""
    checkpoint.save({"epoch": 3}, tmp_path / "epoch3.pt")
    last = tmp_path / "last.pt"
    last.symlink_to("epoch3.pt")
    assert checkpoint.load(last) == {"epoch": 3}
    checkpoint.save({"epoch": 4}, last)
    assert not last.is_symlink()
    assert checkpoint.load(last) == {"epoch": 4}
    assert checkpoint.load(tmp_path / "epoch3.pt") == {"epoch": 3}


def test_a_linked_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    checkpoint.save({"a": 1}, tmp_path / "runs" / "a.pt")
    assert checkpoint.load(tmp_path / "disk" / "a.pt") == {"a": 1}


SAVES_FOREVER = """
import os, sys, torch
from pathlib import Path
from pruning_core import checkpoint
torch.set_num_threads(1)
path, rounds = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(rounds):
    child = os.fork()  # what is slow, the import, happened once
    if child == 0:
        version = checkpoint.load(path)["version"] if path.exists() else 0
        print("ready", os.getpid(), flush=True)
        while True:
            version += 1
            size = 1000 * (1 + version % 300)  # up to 1.2 MB, longer and shorter than the last
            checkpoint.save({"version": version, "payload": torch.full((size,), float(version))}, path)
    os.waitpid(child, 0)
    print("dead", child, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Fifty processes that do nothing but save, each killed with SIGKILL at a random moment."""
    path = tmp_path / "a.pt"
    kills, chance, last, half_written = 50, random.Random(0), 0, 0
    command = [sys.executable, "-c", SAVES_FOREVER, str(path), str(kills)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        try:
            for _ in range(kills):
                word, child = parent.stdout.readline().split()
                assert word == "ready"
                time.sleep(chance.uniform(0.002, 0.15))
                os.kill(int(child), signal.SIGKILL)
                assert parent.stdout.readline().split() == ["dead", child]
                half_written += len(leftovers(tmp_path))
                for name in leftovers(tmp_path):
                    (tmp_path / name).unlink()
                if not path.exists():
                    assert last == 0  # killed before the first save was over
                    continue
                state = checkpoint.load(path)
                version, payload = state["version"], state["payload"]
                assert version >= last
                assert payload.shape == (1000 * (1 + version % 300),)
                assert bool((payload == version).all())
                last = version
        finally:
            parent.kill()
    assert last > kills  # they did save
    assert half_written > 0  # and some were hit while they wrote


def test_leftovers_of_killed_runs_are_taken_away_when_nobody_can_be_writing_them(tmp_path):
    old, fresh, other = (tmp_path / name for name in (".c.pt.a.tmp", ".c.pt.b.tmp", ".d.pt.a.tmp"))
    for leftover in (old, fresh, other):
        leftover.write_bytes(b"half a checkpoint")
    for leftover in (old, other):
        os.utime(leftover, (0, 0))
    checkpoint.save({"x": 1}, tmp_path / "c.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.pt.b.tmp", ".d.pt.a.tmp", "c.pt"]


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    """A tensor class of torch.distributed that torch.load does not know."""

    class Waiting(torch.Tensor):
        pass

    Waiting.__module__ = "torch.distributed._functional_collectives"
    with pytest.raises(
        CheckpointError, match=r"^checkpoint\['a'\]: only tensors and plain data are saved, got Waiting"
    ):
        checkpoint.save({"a": torch.ones(2).as_subclass(Waiting)}, tmp_path / "a.pt")
