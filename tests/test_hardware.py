"""Devices and their memory, on systems that have less of Python's os module than Linux."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from miniawq import hardware
from miniawq.errors import UsageError
from miniawq.hardware import device_memory, devices, peak_memory, pick_device, resident_memory, roomiest
from tests.helpers import ROOT


def test_memory_is_known_without_sysconf(monkeypatch):
    """macOS has no SC_AVPHYS_PAGES, Windows no sysconf."""
    monkeypatch.delattr(os, "sysconf")
    name, total, free = device_memory("cpu")
    assert name == "cpu"
    assert 0 < free <= total == psutil.virtual_memory().total
    assert not [path for path in (ROOT / "miniawq").rglob("*.py") if "sysconf" in path.read_text()]


def test_the_peak_is_at_least_what_is_held_now():
    block = torch.ones(1 << 20)
    assert block.nbytes < resident_memory() <= 1.1 * peak_memory()


def test_the_peak_is_known_on_windows(monkeypatch):
    """Without the module `resource`."""
    monkeypatch.setattr(hardware, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert peak_memory("cpu") == 12345


@pytest.mark.parametrize(("free", "kept"), [(200, "cuda"), (199, "cpu")])
def test_what_takes_more_than_half_of_a_gpu_stays_on_the_host(free, kept, monkeypatch):
    monkeypatch.setattr(hardware, "device_memory", lambda device: SimpleNamespace(free=free))
    assert roomiest(100, torch.device("cuda")).type == kept


def test_the_best_device_is_picked(monkeypatch):
    assert pick_device(None).type == "cpu"
    assert pick_device("cpu") == torch.device("cpu")
    assert devices() == [torch.device("cpu")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None).type == "cuda"
    assert [*map(str, devices())] == ["cuda:0", "cuda:1", "cpu"]


@pytest.mark.parametrize("name", ["", "warp", "cuda:99", "cpu:", "meta", "privateuseone"])
def test_other_devices_are_refused_in_three_lines(name):
    with pytest.raises(UsageError) as caught:
        pick_device(name)
    what, why, fix = str(caught.value).splitlines()
    assert what == f"device {name!r} cannot be used"
    assert len(why) < 250
    assert "cpu, cuda" in fix
