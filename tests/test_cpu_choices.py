"""Choices by measurement: the faster way, once a machine, and the same one ever after."""

import json
import time

import pytest
import torch

from vlm_peft.model.cpu import choices as cpu_choices
from vlm_peft.model.cpu.choices import fastest


class Ways(dict):
    """Candidates that take as many milliseconds as they are told; `runs` counts."""

    def __init__(self, **milliseconds: float):
        self.runs = 0
        super().__init__({name: lambda value=value: self._run(value) for name, value in milliseconds.items()})

    def _run(self, milliseconds: float) -> None:
        self.runs += 1
        time.sleep(milliseconds / 1000)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The file of this machine's choices, in a folder that is not there yet."""
    monkeypatch.setattr(cpu_choices, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(cpu_choices, "_SECONDS", 0.1)
    forget(monkeypatch)
    return tmp_path / "cache" / "vlm_peft_cpu_choices.json"


def forget(monkeypatch) -> None:
    """As in another process."""
    monkeypatch.setattr(cpu_choices, "_chosen", {})


def test_the_fastest_is_measured_once_and_kept(file, monkeypatch):
    ways = Ways(slow=6, fast=1, middle=3)
    assert fastest("task", ways) == "fast"
    assert ways.runs >= 6
    runs = ways.runs
    assert fastest("task", ways) == "fast"
    forget(monkeypatch)
    assert fastest("task", ways) == "fast"
    assert ways.runs == runs
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_first_stays_unless_another_is_clearly_faster():
    assert fastest("task", Ways(first=10.1, second=10)) == "first"


def test_other_tasks_threads_and_versions_are_measured_for_themselves(file, monkeypatch):
    fastest("task", Ways(a=1, b=9))
    assert fastest("other", Ways(a=9, b=1)) == "b"
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert fastest("task", Ways(a=9, b=1)) == "b"
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert fastest("task", Ways(a=1, b=9)) == "a"
    monkeypatch.setattr(cpu_choices, "_machine", lambda: "another machine")
    assert fastest("task", Ways(a=9, b=1)) == "b"
    assert len(json.loads(file.read_text())) == 5


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1}'])
def test_a_damaged_file_is_measured_anew_and_replaced(file, monkeypatch, damage):
    file.parent.mkdir()
    file.write_bytes(damage)
    assert fastest("task", Ways(a=9, b=1)) == "b"
    assert "b" in json.loads(file.read_text()).values()


@pytest.mark.parametrize("stored", ["gone", ["b"], None])
def test_a_choice_that_is_no_candidate_is_measured_anew(file, monkeypatch, stored):
    fastest("task", Ways(a=1, b=9))
    forget(monkeypatch)
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), stored)))
    assert fastest("task", Ways(a=9, b=1)) == "b"
    assert list(json.loads(file.read_text()).values()) == ["b"]


def test_what_another_process_chose_meanwhile_stands(file, monkeypatch):
    def meanwhile(candidates):
        monkeypatch.setattr(cpu_choices, "_measure", original)
        fastest("task", Ways(a=1, b=9))
        forget(monkeypatch)
        return original(candidates)

    original = cpu_choices._measure
    monkeypatch.setattr(cpu_choices, "_measure", meanwhile)
    assert fastest("task", Ways(a=9, b=1)) == "a"


def test_where_nothing_can_be_written_the_choice_lasts_for_the_process(file, monkeypatch):
    file.parent.parent.joinpath("cache").write_text("a file in the folder's place")
    ways = Ways(a=9, b=1)
    assert fastest("task", ways) == "b"
    runs = ways.runs
    assert fastest("task", ways) == "b"
    assert ways.runs == runs
