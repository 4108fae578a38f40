"""What this machine can do, on one screen: `python scripts/doctor.py`.

Every line that says no also says what would change it. Exit code 1 if nothing here can train.
"""

from __future__ import annotations

import argparse
import json
import netrc
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

INSTALL = "bash setup-and-run.sh --build-only"


@dataclass
class Finding:
    """One line."""

    what: str
    ok: bool
    says: str
    remedy: str = ""
    """A command, or what to do, where it is not well."""
    needed: bool = False
    """Nothing trains without it."""


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def python() -> list[Finding]:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    says = f"{platform.python_version()} at {sys.executable}"
    found = [Finding("Python", ok, says, f"PYTHON=python3.12 {INSTALL}", needed=True)]
    for name in ("torchrl", "tensordict"):
        there = version(name)
        found.append(Finding(name, bool(there), there or "not installed", INSTALL, needed=True))
    return found


def torch_and_gpus() -> list[Finding]:
    try:
        import torch
    except ImportError as e:
        return [Finding("torch", False, f"cannot be imported: {e}", INSTALL, needed=True)]
    found = [Finding("torch", True, f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = shutil.which("nvidia-smi")
    if not count:
        if torch.version.cuda is None:
            remedy = "a machine with an NVIDIA GPU; torch here is a build without CUDA"
        elif driver:
            remedy = "nvidia-smi, which says what is wrong with the driver; CUDA_VISIBLE_DEVICES"
        else:
            remedy = "an NVIDIA driver; in a container: --gpus all"
        says = "none: everything runs on the CPU, small tasks in minutes"
        return [*found, Finding("GPUs", False, says, remedy)]
    names = []
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        names.append(f"cuda:{i} {name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    found.append(Finding("GPUs", True, "; ".join(names)))
    found.append(compiler())
    if count > 1:
        says = "cuda:0 simulates, cuda:1 learns, at the same time (collector=thread)"
    else:
        says = "cuda:0 simulates and learns in turn"
    more = "" if count > 1 else "a second GPU would let both go on without pause"
    return [*found, Finding("division of work", True, says, more)]


def compiler() -> Finding:
    """What Triton builds its launchers with, at the first compiled update."""
    cc = next(filter(None, (os.environ.get("CC"), *map(shutil.which, ("gcc", "clang")))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    lacks = [what for what, there in (("a C compiler", cc), ("Python.h", header.exists()))
             if not there]  # fmt: skip
    says = f"{cc}, {header}" if not lacks else f"no {' and no '.join(lacks)}"
    remedy = (
        "gcc and Python's headers (Debian: apt install gcc python3-dev), or "
        "optimization.compile.enabled=false, which is slower"
    )
    return Finding("C compiler", not lacks, says, remedy if lacks else "")


def simulators() -> list[Finding]:
    from dreamer_isaac.config import isaaclab_available, module_exists
    from dreamer_isaac.launch import isaaclab_is_3

    embedded = " ".join(f"{n} {version(n)}" for n in ("mjlab", "mujoco-warp", "warp-lang"))
    here = bool(version("mjlab"))
    found = [Finding("embedded simulator", here, embedded if here else "not installed", INSTALL)]
    if not module_exists("isaaclab"):
        remedy = "docker/ or docs/isaaclab.md; the embedded one does without"
        return [*found, Finding("Isaac Lab", False, "not installed", remedy)]
    there = version("isaaclab") or ("3.x" if isaaclab_is_3() else "without a version")
    engine = "Isaac Sim" if module_exists("isaacsim") else "Newton, kit-less"
    if not isaaclab_available():
        return [*found, Finding("Isaac Lab", False, f"{there}, but no simulator under it",
                                "pip install isaacsim (2.x) or newton (3.x)")]  # fmt: skip
    return [*found, Finding("Isaac Lab", True, f"{there} on {engine}; it is used unless "
                                               "env.backend=mjlab")]  # fmt: skip


def pictures() -> list[Finding]:
    try:
        import imageio_ffmpeg

        path = imageio_ffmpeg.get_ffmpeg_exe()
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20)
        first = done.stdout.splitlines()[0].split(" Copyright")[0] if done.stdout else ""
        ok, says = done.returncode == 0 and bool(first), f"{first} ({path})"
    except Exception as e:  # not there, not executable, of another machine
        ok, says = False, f"{type(e).__name__}: {e}"
    remedy = f"{INSTALL}, or IMAGEIO_FFMPEG_EXE=<path>; without it: evaluation.video=false"
    here = bool(version("mujoco-warp"))
    rays = (
        "rays on any device, without OpenGL and display" if here else "by Isaac Lab's cameras only"
    )
    return [
        Finding("rendering", here, rays, INSTALL),
        Finding("ffmpeg", ok, says, remedy),
    ]  # fmt: skip


def disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = usage.free / 2**30
    writable = os.access(folder, os.W_OK)
    says = f"{free:.0f} GiB free in {folder}" + ("" if writable else ", not writable")
    return Finding("disk", writable and free > 2, says, "another run.dir=<folder>")


def assets() -> Finding:
    from dreamer_isaac.config import AssetsConfig

    root = ROOT / AssetsConfig().root
    files = [p for p in (root / "Assets").rglob("*") if p.is_file()] if root.exists() else []
    size = sum(p.stat().st_size for p in files) / 2**20
    says = f"{len(files)} files, {size:.0f} MiB in {root}" if files else f"no mirror in {root}"
    return Finding("offline assets", bool(files), says,
                   "python scripts/download_assets.py --task <task>; only Isaac Lab without a "
                   "network needs them")  # fmt: skip


def wandb() -> Finding:
    """Whether one is logged in; never the key."""
    if not version("wandb"):
        return Finding("Weights & Biases", False, "not installed", INSTALL)
    how = "by WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else ""
    try:
        hosts = netrc.netrc().hosts
        how = how or next((f"for {h} in ~/.netrc" for h in hosts if "wandb" in h), "")
    except (OSError, netrc.NetrcParseError):
        pass
    says = f"logged in {how}" if how else "not logged in"
    mode = os.environ.get("WANDB_MODE")
    return Finding("Weights & Biases", bool(how), says + (f", WANDB_MODE={mode}" if mode else ""),
                   "wandb login; logger.mode=offline needs none")  # fmt: skip


def findings() -> list[Finding]:
    """Everything, in the order in which it is shown."""
    found = python()
    parts = (torch_and_gpus, simulators, pictures, lambda: [disk(ROOT / "runs")],
             lambda: [assets()], lambda: [wandb()])  # fmt: skip
    for part in parts:
        try:
            found += part()
        except Exception as e:  # one broken package must not hide the rest
            what = "torch" if part is torch_and_gpus else part.__name__
            says = f"{type(e).__name__}: {e}"
            found.append(Finding(what, False, says, INSTALL, needed=part is torch_and_gpus))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    found = findings()
    able = all(f.ok for f in found if f.needed) and any(
        f.ok for f in found if f.what in ("embedded simulator", "Isaac Lab")
    )
    if arguments.json:
        print(json.dumps({"able": able, "findings": [asdict(f) for f in found]}, indent=2))
        return 0 if able else 1
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores\n")
    for f in found:
        print(f"{'yes' if f.ok else 'no ':4}{f.what:19}{f.says}")
        if f.remedy and (not f.ok or f.what == "division of work"):
            print(f"{'':23}-> {f.remedy}")
    task = "python dreamer_isaac.py env.name=Isaac-Ant-v0"
    print(f"\n{'It can train: ' + task if able else 'It cannot train yet: ' + INSTALL}")
    return 0 if able else 1


if __name__ == "__main__":
    sys.exit(main())
