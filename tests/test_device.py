from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from refinedet.device import pick_device
from refinedet.errors import UsageError


def test_known_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")


@pytest.mark.parametrize(
    "name", ["meta", "xpu", "vulkan", "privateuseone", "gpu", "", "cpu:x", "None", "cuda:2", "cuda", "mps"]
)
def test_others_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        pick_device(name)
    assert f"device '{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


PAGE_FAULTS = """
import resource
import torch
from refinedet.device import pick_device

pick_device("cpu")
for image in range(30):
    if image == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    outputs = [torch.ones(5 << 20) for layer in range(3)]  # of 20 MB each
    del outputs
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_of_a_cpu_is_used_again() -> None:
    def page_faults(**settings: str) -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        run = [sys.executable, "-c", PAGE_FAULTS]
        return int(subprocess.run(run, env=environment | settings, capture_output=True, check=True).stdout)

    # glibc's default, as a setting of the environment, which is respected: 60 MB are cleared for each image.
    assert page_faults() < 0.1 * page_faults(MALLOC_TRIM_THRESHOLD_="131072")
