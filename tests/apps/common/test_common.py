"""What every app shares: command lines, devices and ranks, signals, folders and tables."""

from __future__ import annotations

import csv
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from apps.common import arguments, interrupt
from apps.common.arguments import EXIT_BAD_INPUT, Parser
from apps.common.errors import BadInput
from apps.common.interrupt import Interrupt
from apps.common.ranks import Ranks, choose_device, start
from apps.common.run_folder import ResultsTable, latest_folder, new_folder, safe_name
from apps.common.yaml_file import write_yaml

ONE = Ranks(rank=0, size=1, local=0, device=torch.device("cpu"))


# ---- command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def parser() -> Parser:
    made = Parser(description="", epilog="")
    made.gone = {"--evolve": "leave it out", "--adam": "write --optimizer Adam"}
    group = made.add_argument_group("all")
    group.add_argument("--epochs", type=int, default=100)
    group.add_argument("--batch-size", type=int, default=16)
    group.add_argument("--freeze", type=int, nargs="+", default=[0])
    group.add_argument("--resume", nargs="?", const=True)
    group.add_argument("--cos-lr", action="store_true")
    return made


def refused(parser: Parser, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command line that exits with code 2."""
    with pytest.raises(SystemExit) as left:
        parser.parse_args(words)
    assert left.value.code == EXIT_BAD_INPUT == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "3"], r"--epoch: unknown option; did you mean '--epochs'\?"),
        (["--epoch=3"], r"--epoch: unknown option; did you mean '--epochs'\?"),
        (["--cos"], r"--cos: unknown option; did you mean '--cos-lr'\?"),
        (["-epochs", "3"], r"-epochs: unknown option; did you mean '--epochs'\?"),
        (["--batch_size=3"], r"--batch_size: unknown option; did you mean '--batch-size'\?"),
        (["--zzzzzz"], r"--zzzzzz: unknown option; see --help"),
        (["--evolve"], r"--evolve: is no option here; leave it out"),
        (["--evolve=300"], r"--evolve: is no option here; leave it out"),
        (["--evolve", "300"], r"--evolve: is no option here; leave it out"),
        (["--adam", "--epochs", "3"], r"--adam: is no option here; write --optimizer Adam"),
        (["data.yaml"], r"arguments: unexpected 'data.yaml'; every value follows an --option"),
        (["--cos-lr", "yes"], r"arguments: unexpected 'yes'; every value follows an --option"),
        (["--epochs", "many"], r"--epochs: .*'many'"),
        (["--epochs"], r"--epochs: expected one argument"),
    ],
)
def test_a_wrong_word_is_answered_with_one_line(parser, capsys, words, message):
    assert re.fullmatch(message, refused(parser, words, capsys))


def test_rank_0_alone_speaks(parser, capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(arguments, "RANK_0_SPEAKS_WITHIN", 0.5)
    monkeypatch.setattr(arguments, "time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--evolve"])
    assert left.value.code == EXIT_BAD_INPUT
    assert capsys.readouterr() == ("", "")
    assert waits == [0.5]

    monkeypatch.setenv("RANK", "0")
    refused(parser, ["--evolve"], capsys)
    assert waits == [0.5]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--epochs", "100"], {"epochs": 100}),
        (["--cos-lr", "--batch-size=4"], {"cos_lr": True, "batch_size": 4}),
        (["--resume"], {"resume": True}),
        (["--freeze", "1", "2"], {"freeze": [1, 2]}),
    ],
)
def test_given_has_what_is_on_the_command_line_and_no_defaults(parser, words, expected):
    before = vars(parser.parse_args([]))
    assert parser.given(words) == expected
    assert vars(parser.parse_args([])) == before
    assert vars(parser.parse_args(words)) == before | expected


def test_given_leaves_the_defaults_intact_after_a_mistake(parser, capsys):
    before = vars(parser.parse_args([]))
    with pytest.raises(SystemExit):
        parser.given(["--nonsense"])
    assert vars(parser.parse_args([])) == before
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- devices and ranks ----------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with that many CUDA devices, and with mps or without."""

    def pretend(cuda: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "wanted", "local", "local_size", "expected"),
    [
        (0, "", 0, 1, "cpu"),
        (0, "", 1, 2, "cpu"),
        (2, "cpu", 0, 1, "cpu"),
        (0, " CPU ", 0, 1, "cpu"),
        (0, "cpu", 1, 2, "cpu"),
        (1, "", 0, 1, "cuda:0"),
        (2, "", 1, 2, "cuda:1"),
        (2, "cuda:1", 0, 1, "cuda:1"),
        (2, "1", 0, 1, "cuda:1"),
        (4, "3,1", 0, 2, "cuda:3"),
        (4, "3,1", 1, 2, "cuda:1"),
        (4, "cuda:0,2", 1, 2, "cuda:2"),
        (0, "mps", 0, 1, "mps"),
    ],
)
def test_the_device_of_each_process(machine, cuda, wanted, local, local_size, expected):
    machine(cuda, mps=True)
    assert str(choose_device(wanted, local, local_size)) == expected


@pytest.mark.parametrize(
    ("cuda", "mps", "wanted", "local_size", "message"),
    [
        (0, False, "mps", 1, r"no mps device here, got mps; use --device cpu"),
        (0, True, "mps", 2, r"mps runs one process, got 2; start it without torchrun"),
        (2, False, "gpu", 1, r"unknown device, got gpu; use cpu, mps, cuda:0 or indices such as 0,1"),
        (2, False, "cuda", 1, r"unknown device, got cuda; .*"),
        (2, False, "0,", 1, r"unknown device, got 0,; .*"),
        (2, False, "-1", 1, r"unknown device, got -1; .*"),
        (2, False, "²", 1, r"unknown device, got ²; .*"),
        (0, False, "0", 1, r"no CUDA device here, got 0; use --device cpu"),
        (0, False, "cuda:0", 1, r"no CUDA device here, got cuda:0; use --device cpu"),
        (2, False, "0,1", 1, r"one CUDA device per process, got 0,1 for 1; start with torchrun --nproc_per_node 2, .*"),
        (2, False, "0", 2, r"one CUDA device per process, got 0 for 2; .* or give 2 different indices"),
        (2, False, "1,1", 2, r"one CUDA device per process, got 1,1 for 2; .*"),
        (2, False, "2", 1, r"2 CUDA devices here, got index 2; count from 0"),
        (2, False, "0,5", 2, r"2 CUDA devices here, got index 5; count from 0"),
        (1, False, "", 2, r"1 CUDA devices here, got index 1; count from 0"),
    ],
)
def test_a_wrong_device_is_named_on_every_rank(machine, cuda, mps, wanted, local_size, message):
    """On every rank: rank 0 is the one that speaks, and it would wait for the others."""
    machine(cuda, mps)
    for local in range(local_size):
        with pytest.raises(BadInput) as caught:
            choose_device(wanted, local, local_size)
        assert re.fullmatch("--device: " + message, str(caught.value))


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = start("cpu")
    assert (ranks.rank, ranks.size, ranks.local, ranks.device.type, ranks.first) == (0, 1, 0, "cpu", True)
    assert not torch.distributed.is_initialized()


def test_one_process_agrees_with_itself(capsys):
    value = {"a": [1]}
    assert ONE.any(True) is True
    assert ONE.any(False) is False
    assert ONE.from_first(value) is value
    assert ONE.gather(value) == [value]
    with ONE.together():
        ONE.say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_together_passes_bad_input_on_and_no_other_error_is_swallowed():
    with pytest.raises(BadInput, match=r"^--data: gone$"), ONE.together():
        raise BadInput("--data: gone")
    with pytest.raises(ZeroDivisionError), ONE.together():
        raise ZeroDivisionError


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(interrupt, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return now


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_becomes_a_wish(clock, number, code):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with Interrupt() as wish:
        assert wish.signal is None
        send(number)
        assert wish.signal == number
        assert wish.exit_code == code
    assert {each: signal.getsignal(each) for each in before} == before
    assert wish.exit_code == code


def test_the_handlers_come_back_after_an_error():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), Interrupt():
        raise ZeroDivisionError
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_stops_at_once_when_a_second_has_passed(clock):
    with Interrupt() as wish:
        send(signal.SIGINT)
        clock[0] += 0.9
        send(signal.SIGINT)
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert wish.signal == signal.SIGINT


def test_the_first_signal_counts_and_sigterm_never_stops_at_once(clock):
    with Interrupt() as wish:
        send(signal.SIGTERM)
        clock[0] += 60
        send(signal.SIGTERM)
        assert wish.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert wish.exit_code == 143


def test_under_torchrun_a_second_ctrl_c_changes_nothing(clock, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interrupt() as wish:
        for _ in range(3):
            send(signal.SIGINT)
            clock[0] += 60
    assert wish.exit_code == 130


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_run_takes_the_first_free_folder(tmp_path):
    taken = []
    for _ in range(3):
        folder = new_folder(tmp_path / "project", "exp", exist_ok=False)
        assert not folder.exists()
        folder.mkdir(parents=True)
        taken.append(folder.name)
    assert taken == ["exp", "exp2", "exp3"]
    (tmp_path / "project/exp2").rmdir()
    assert new_folder(tmp_path / "project", "exp", exist_ok=False).name == "exp2"


def test_exist_ok_takes_the_folder_as_it_is(tmp_path):
    assert new_folder(tmp_path, "exp", exist_ok=True) == tmp_path / "exp"
    (tmp_path / "exp").mkdir()
    assert new_folder(tmp_path, "exp", exist_ok=True) == tmp_path / "exp"


@pytest.mark.parametrize("marker", ["resume.pt", "weights/resume.pt"])
def test_the_latest_folder_is_the_one_written_last(tmp_path, marker):
    for age, name in enumerate(["new", "old", "older"]):
        file = tmp_path / name / marker
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    (tmp_path / "without").mkdir()
    (tmp_path / "a-folder" / marker).mkdir(parents=True)
    assert latest_folder(tmp_path, marker) == tmp_path / "new"


@pytest.mark.parametrize("project", ["empty", "missing"])
def test_no_run_to_go_on_with(tmp_path, project):
    (tmp_path / "empty/exp/weights").mkdir(parents=True)
    message = rf"--resume: no interrupted run, got {tmp_path / project}; give the folder of the run"
    with pytest.raises(BadInput, match=f"^{message}$"):
        latest_folder(tmp_path / project, "weights/resume.pt")


@pytest.mark.parametrize("name", ["exp", "exp2", "v1.0", "a-b_c+d", ".hidden", "größe"])
def test_plain_names(name):
    assert safe_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a b", "a\n", "a:b"])
def test_a_name_is_one_folder(name):
    message = rf"--name: must be a plain folder name, got {name!r}; put the path into --project"
    with pytest.raises(BadInput) as caught:
        safe_name(name)
    assert str(caught.value) == message


def test_settings_are_read_back_in_their_order(tmp_path):
    content = {"b": 1, "a": [0.5, None, "x: y"], "c": {"d": True}}
    write_yaml(tmp_path / "new/args.yaml", content)
    found = yaml.safe_load((tmp_path / "new/args.yaml").read_text())
    assert found == content
    assert list(found) == list(content)


# ---- table of results -----------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_grows_a_row_at_a_time_and_new_columns_may_come_later(tmp_path):
    table = ResultsTable(tmp_path / "exp/results.csv")
    table.add({"epoch": 1, "loss": 1 / 3})
    assert read(table.path) == [{"epoch": "1", "loss": "0.333333"}]
    table.add({"epoch": 2, "loss": 0.25, "mAP": 1e-9})
    table.add({"epoch": 3, "loss": 1234567.0, "a, b": 'quoted "text"'})
    assert read(table.path) == [
        {"epoch": "1", "loss": "0.333333", "mAP": "", "a, b": ""},
        {"epoch": "2", "loss": "0.25", "mAP": "1e-09", "a, b": ""},
        {"epoch": "3", "loss": "1234570.0", "mAP": "", "a, b": 'quoted "text"'},
    ]
    assert table.column("mAP") == [(2, 1e-9)]
    assert table.column("loss") == [(1, 0.333333), (2, 0.25), (3, 1234570.0)]
    assert table.column("unknown") == []


def test_a_resumed_table_is_the_uninterrupted_one(tmp_path):
    rows = [{"epoch": 1, "loss": 0.1234567}, {"epoch": 2, "loss": 2.0, "mAP": 0.5}, {"epoch": 3, "loss": 3.0}]
    whole = ResultsTable(tmp_path / "whole.csv")
    for row in rows:
        whole.add(row)
    first = ResultsTable(tmp_path / "parts.csv")
    first.add(rows[0])
    first.add(rows[1])
    saved = first.rows
    second = ResultsTable(first.path, saved)
    second.add(rows[2])
    assert len(saved) == 2  # the rows of a state are not changed behind its back
    assert first.path.read_bytes() == whole.path.read_bytes()
    assert second.column("loss") == whole.column("loss")


def test_a_failed_write_leaves_the_table_that_was_there(tmp_path, monkeypatch):
    table = ResultsTable(tmp_path / "results.csv")
    table.add({"epoch": 1})
    before = table.path.read_bytes()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        table.add({"epoch": 2})
    assert table.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
