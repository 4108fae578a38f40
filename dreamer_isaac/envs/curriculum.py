"""What a task's curriculum has come to: read, saved and restored alike on mjlab and Isaac Lab,
whose managers are the same."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def levels(sim: Any) -> dict[str, float]:
    """Name -> level of every curriculum term that reports one; waits for the device."""
    manager = getattr(sim, "curriculum_manager", None)
    out: dict[str, float] = {}
    for name, value in getattr(manager, "_curriculum_state", {}).items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in parts:
            if isinstance(number, Tensor | int | float):
                out[f"{name}/{part}" if part else name] = float(number)
    return out


def _terms(sim: Any) -> dict[str, Any]:
    """The curriculum's terms by name, as the manager configures them."""
    manager = getattr(sim, "curriculum_manager", None)
    names, cfgs = getattr(manager, "_term_names", []), getattr(manager, "_term_cfgs", [])
    return dict(zip(names, cfgs, strict=True))


def _keeping(sim: Any) -> dict[str, Any]:
    """Those that keep something of their own and offer it."""
    terms = {n: c.func for n, c in _terms(sim).items()}
    return {n: f for n, f in terms.items() if hasattr(f, "get_state") and hasattr(f, "set_state")}


def state(sim: Any) -> dict[str, Any]:
    """What the next episodes' difficulty follows from: the terrain's levels, what terms keep
    (tensors and numbers), and the steps so far, which schedules go by. Empty for a task without a
    curriculum."""
    if not getattr(getattr(sim, "curriculum_manager", None), "active_terms", ()):
        return {}
    out: dict[str, Any] = {"common_step_counter": int(sim.common_step_counter)}
    terrain = getattr(sim.scene, "terrain", None)
    if getattr(terrain, "terrain_levels", None) is not None:
        out["terrain_levels"] = terrain.terrain_levels.clone()  # type: ignore[union-attr]
    kept: dict[str, Any] = {}
    for name, term in _keeping(sim).items():
        value = term.get_state()
        if isinstance(value, Tensor):
            kept[name] = value.clone()
        elif isinstance(value, int | float):
            kept[name] = float(value)  # a plain one, which a checkpoint can be read with
    return out | ({"terms": kept} if kept else {})


def _spread(values: Tensor, envs: int) -> Tensor:
    """One of each env -> one of each of another number of envs: the same shares of each value, as
    far as that goes."""
    return values[torch.arange(envs, device=values.device) * len(values) // envs]


def _pause(manager: Any) -> None:
    """Leave out the next `compute`, of the reset that a resumed run begins with: it would judge the
    robots' old places by the new origins, and promote."""
    compute = manager.compute

    def once(*_: Any, **__: Any) -> None:
        manager.compute = compute

    manager.compute = once


def restore(sim: Any, saved: dict[str, Any]) -> None:
    """Go on from `state`: episodes that begin from now on are as difficult as they were."""
    if not saved:
        return
    sim.common_step_counter = saved["common_step_counter"]
    terrain = getattr(sim.scene, "terrain", None)
    if "terrain_levels" in saved and terrain is not None:
        terrain.terrain_levels.copy_(_spread(saved["terrain_levels"], len(terrain.terrain_levels)))
        terrain.env_origins.copy_(
            terrain.terrain_origins[terrain.terrain_levels, terrain.terrain_types]
        )
    _restore_terms(sim, saved.get("terms", {}))
    _pause(sim.curriculum_manager)


def _restore_terms(sim: Any, kept: dict[str, Any]) -> None:
    """Give terms what they kept, and compute all of them, because schedules change rewards and
    commands only then. Of no env: none has come to the end of an episode, so nothing is promoted.
    A term that cannot be computed so waits for the first end of an episode."""
    terms = _keeping(sim)

    def give(name: str) -> None:
        value, now = kept[name], terms[name].get_state()
        if isinstance(value, Tensor):
            value = value.to(sim.device)
            if isinstance(now, Tensor) and value.dim() and value.shape != now.shape:
                value = _spread(value, len(now))
        terms[name].set_state(value)

    known = [n for n in kept if n in terms]
    for name in known:
        give(name)
    none = torch.zeros(0, dtype=torch.long, device=sim.device)
    for name, cfg in _terms(sim).items():
        with contextlib.suppress(Exception):  # a user's; it was not made for this
            sim.curriculum_manager._curriculum_state[name] = cfg.func(sim, none, **cfg.params)
    for name in known:  # the mean over no env is NaN
        if not torch.isfinite(torch.as_tensor(terms[name].get_state()).double()).all():
            give(name)
