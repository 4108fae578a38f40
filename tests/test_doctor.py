"""scripts/doctor.py: what it finds is so, and every no has a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import doctor
import pytest
import torch
from conftest import embedded


def by_name() -> dict[str, doctor.Finding]:
    return {f.what: f for f in doctor.findings()}


def test_every_no_says_what_would_change_it() -> None:
    for finding in doctor.findings():
        assert finding.ok or finding.remedy, finding


@embedded
def test_what_is_here_is_found(capsys: Any) -> None:
    assert doctor.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {f["what"]: f for f in said["findings"]}
    assert said["able"] and torch.__version__ in found["torch"]["says"]
    assert found["GPUs"]["ok"] == torch.cuda.is_available()
    assert doctor.main([]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 40 and "It can train" in screen


@embedded
def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "SECRET-KEY")
    doctor.main([])
    assert "SECRET-KEY" not in capsys.readouterr().out
    assert by_name()["Weights & Biases"].ok
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not by_name()["Weights & Biases"].ok
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password SECRET-KEY\n")
    (tmp_path / ".netrc").chmod(0o600)
    doctor.main([])
    said = capsys.readouterr().out
    assert "SECRET-KEY" not in said and "for api.wandb.ai" in said


def test_two_gpus_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU")
    found = by_name()
    assert found["GPUs"].says.count("70 of 80 GiB") == 2
    assert "cuda:0 simulates, cuda:1 learns" in found["division of work"].says


def test_a_broken_ffmpeg_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    finding = by_name()["ffmpeg"]
    assert not finding.ok and "IMAGEIO_FFMPEG_EXE" in finding.remedy


def test_without_a_simulator_it_cannot_train(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda n: "" if n == "mjlab" else real(n))
    assert doctor.main([]) == 1
    assert "setup-and-run.sh --build-only" in capsys.readouterr().out.splitlines()[-1]
