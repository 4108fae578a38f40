"""Isaac Lab 2.3.2's configuration classes without Isaac Sim: a program of its own, because
stand-ins for Kit's modules must not reach any other test.

    python tests/isaaclab2.py list OUT                what every task names, as JSON
    python tests/isaaclab2.py check ROOT OUT          every task on a mirror, the network refused

`carb`, `omni`, `isaacsim`, ... exist only inside Kit. An import of one makes a module that has
every attribute; Isaac Lab's own classes, torch, pxr and gymnasium are the real ones.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import re
import socket
import sys
import types
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / ".venv" / "isaaclab-2.3.2"
"""Where setup-and-run.sh --test puts requirements-isaaclab.lock."""

KIT = {"carb", "omni", "isaacsim", "usdrt", "Semantics", "nvidia"}
PXR = {"pxr.PhysxSchema", "pxr.PhysicsSchemaTools", "pxr.ForceFieldSchema", "pxr.Semantics"}
UNUSED = {"hid", "cv2", "h5py", "pinocchio", "pink", "dex_retargeting", "numba",
          "flatdict", "pyglet", "transformers", "einops"}  # fmt: skip
"""Imported by Isaac Lab's modules and used by no configuration; real ones win."""


class Loose(type):
    """A class whose every attribute is there."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class Anything(types.ModuleType):
    """A module with every attribute: a class where the name looks like one."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if full in sys.modules:
            return sys.modules[full]
        value: Any = MagicMock()
        if name[0].isupper():
            value = Loose(name, (), {"__init__": lambda self, *a, **k: None})
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for the given names and everything below them."""

    def __init__(self, names: set[str]):
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname in self.names or fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        FILL.get(module.__name__, lambda _: None)(module)


MORE = ("isaaclab_mimic.envs", "isaaclab_mimic.locomanipulation_sdg.envs",
        "isaaclab_tasks.manager_based.manipulation.pick_place",
        "isaaclab_tasks.manager_based.locomanipulation.pick_place")  # fmt: skip
"""Modules with tasks that `isaaclab_tasks` does not import by itself (`env.import` would)."""

SERVER = "https://omniverse-content-production.s3-us-west-2.amazonaws.com"
SETTINGS = {"/persistent/isaac/asset_root/cloud": f"{SERVER}/Assets/Isaac/5.1"}


def fill_settings(module: Any) -> None:
    settings = MagicMock()
    settings.get = settings.get_as_string = settings.get_as_bool = SETTINGS.get
    module.get_settings = lambda: settings


def fill_client(module: Any) -> None:
    """A client for which every file is there, and empty; not there at all in `check`."""

    class Result:
        OK, ERROR_NOT_FOUND = "OK", "ERROR_NOT_FOUND"

    def copy(source: str, target: str, *_: Any) -> str:
        if "check" in sys.argv:
            raise AssertionError(f"the server was asked for {source}")
        Path(target).write_bytes(b"")
        return Result.OK

    def stat(url: str) -> tuple[str, None]:
        if "check" in sys.argv and "://" in url:
            raise AssertionError(f"the server was asked about {url}")
        return Result.OK, None

    module.Result, module.CopyBehavior = Result, MagicMock()
    module.copy, module.stat = copy, stat
    module.break_url = lambda url: types.SimpleNamespace(path=url.split("://")[-1])


def fill_urdf(module: Any) -> None:
    """Five tasks convert a USD to a URDF in their configuration."""

    class UsdToUrdf:
        @classmethod
        def init_from_file(cls, path: str, **_: Any) -> UsdToUrdf:
            return cls()

        def save_to_file(self, urdf_output_path: str, **_: Any) -> str:
            Path(urdf_output_path).write_text("<robot name='empty'/>")
            return urdf_output_path

    module.UsdToUrdf = UsdToUrdf


FILL: dict[str, Any] = {
    "carb": lambda m: setattr(m, "settings", importlib.import_module("carb.settings")),
    "carb.settings": fill_settings,
    "omni.client": fill_client,
    "isaacsim.core.version": lambda m: setattr(m, "get_version", lambda: ("5.1.0", *"51000000")),
    "nvidia.srl.from_usd.to_urdf": fill_urdf,
}


def prepare() -> None:
    """Before the first import of Isaac Lab."""
    source = PACKAGES / "isaaclab" / "source"
    os.environ["EXP_PATH"] = str(source.parent / "apps")
    sys.path.insert(0, str(PACKAGES))
    # Before the folder above: there `isaaclab` is the package that starts Kit.
    for name in ("contrib", "rl", "mimic", "tasks", "assets", ""):
        sys.path.insert(0, str(source / f"isaaclab_{name}".rstrip("_")))
    sys.path.insert(0, str(ROOT))
    import torch
    import torchrl.envs  # noqa: F401  (it asks which packages are there: not the stand-ins)

    sys.meta_path.insert(0, Finder(KIT | {"torchvision"}))
    sys.meta_path.append(Finder(PXR | UNUSED))
    script = torch.jit.script

    def tolerant(function: Any, *rest: Any, **options: Any) -> Any:
        try:  # functions that call into a stand-in cannot be compiled
            return script(function, *rest, **options)
        except Exception:
            return function

    torch.jit.script = tolerant  # type: ignore[assignment]


def tasks() -> dict[str, Any]:
    """Every task's configuration with a camera, by our own function; or why there is none."""
    from dreamer_isaac.config import Config, ConfigError
    from dreamer_isaac.envs.isaaclab import load_tasks, task_config

    for module in MORE:
        importlib.import_module(module)
    cfg = Config()
    cfg.env.num_envs, out = 4, {}
    cameras = {"side": "side", "far": {"position": [9, 0, 2], "target": [0, 0, 1]}}
    for cfg.env.name in load_tasks():
        cfg.env.from_pixels, cfg.env.cameras = "true", cameras
        try:
            task = task_config(cfg, "cpu")
        except ConfigError as e:
            cfg.env.from_pixels, cfg.env.cameras = "false", {}
            task = task_config(cfg, "cpu")
            task.no_camera = str(e)
        out[cfg.env.name] = task
    return out


def strings(node: Any, seen: set[int]) -> list[str]:
    """Every text in a configuration; not the function that the product uses."""
    if isinstance(node, str):
        return [node]
    if node is None or isinstance(node, int | float | bytes | type) or id(node) in seen:
        return []
    seen.add(id(node))
    if isinstance(node, dict):
        parts = [*node.keys(), *node.values()]
    elif isinstance(node, list | tuple | set):
        parts = list(node)
    elif callable(node) or not hasattr(node, "__dict__"):
        return []
    else:
        parts = list(vars(node).values())
    return [text for part in parts for text in strings(part, seen)]


def named(name: str, cfg: Any) -> Any:
    import gymnasium

    from dreamer_isaac.assets.tasks import assets_of, with_run_time

    return with_run_time(assets_of(cfg), "5.1", gymnasium.spec(name).entry_point)


def list_all(out: Path) -> None:
    from dreamer_isaac.envs.isaaclab_cameras import robot_of

    result = {}
    for name, cfg in tasks().items():
        cameras = {
            k: {"pos": list(v.offset.pos), "rot": list(v.offset.rot), "kind": type(v).__name__,
                "convention": v.offset.convention, "size": [v.width, v.height]}
            for k, v in vars(cfg.scene).items() if k in getattr(cfg, "dreamer_isaac_cameras", {})
        }  # fmt: skip
        result[name] = {
            "assets": {a.path: by for a, by in named(name, cfg).items()},
            "urls": sorted({t for t in strings(cfg, set()) if "/Assets/Isaac/" in t}),
            "cameras": cameras, "why not": getattr(cfg, "no_camera", ""),
            "root": list(robot_of(cfg).init_state.pos) if cameras else None,
            "spacing": getattr(cfg.scene, "env_spacing", None),
        }  # fmt: skip
    out.write_text(json.dumps(result))


def check(root: Path, out: Path) -> None:
    """On the mirror: what is missing by the preflight, and by looking at the files themselves."""

    def refused(*_: Any) -> None:
        raise AssertionError("the network was used")

    socket.socket.connect = refused  # type: ignore[assignment]
    from dreamer_isaac.assets.mirror import Mirror
    from dreamer_isaac.assets.resolver import Resolver, install

    resolver = Resolver(Mirror(root), strict=True)
    install(resolver)
    from pxr import Usd, UsdUtils

    result: dict[str, Any] = {"tasks": 0, "preflight": {}, "absent": [], "urls": [], "broken": {}}
    opened: set[str] = set()
    for name, cfg in tasks().items():
        result["tasks"] += 1
        pre = resolver.preflight(named(name, cfg))
        if pre.missing or pre.unread:
            result["preflight"][name] = [a.path for a in (*pre.missing, *pre.unread)]
        texts = strings(cfg, set())
        result["urls"] += [t for t in texts if re.match(r"(https?|omniverse)://", t)]
        for text in texts:
            if "/Assets/Isaac/" not in text:
                continue
            if not os.path.exists(text):
                result["absent"].append(text)
            elif re.search(r"\.usd[acz]?$", text) and text not in opened:
                opened.add(text)
                stage = Usd.Stage.Open(text)
                layers, assets, unresolved = UsdUtils.ComputeAllDependencies(text)
                if not stage or unresolved or len(layers) + len(assets) < 4:
                    result["broken"][text] = list(unresolved)
    result["opened"] = len(opened)
    result["report"] = resolver.report()
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    arguments = [Path(a) for a in sys.argv[2:]]
    prepare()
    {"list": list_all, "check": check}[sys.argv[1]](*arguments)
