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
    """Terms that keep something of their own and offer it, by name."""
    manager = sim.curriculum_manager
    names, cfgs = getattr(manager, "_term_names", []), getattr(manager, "_term_cfgs", [])
    return {n: c.func for n, c in zip(names, cfgs, strict=True) if hasattr(c.func, "get_state")}


def state(sim: Any) -> dict[str, Any]:
    """What the next episodes' difficulty follows from: the terrain's levels, what terms keep, and
    the steps so far, which schedules go by. Empty for a task without a curriculum."""
    if not getattr(getattr(sim, "curriculum_manager", None), "active_terms", ()):
        return {}
    out: dict[str, Any] = {"common_step_counter": int(sim.common_step_counter)}
    terrain = getattr(sim.scene, "terrain", None)
    if getattr(terrain, "terrain_levels", None) is not None:
        out["terrain_levels"] = terrain.terrain_levels.clone()  # type: ignore[union-attr]
    terms = {n: t.get_state() for n, t in _terms(sim).items()}
    terms = {n: v for n, v in terms.items() if isinstance(v, Tensor | int | float)}  # is saved
    return out | ({"terms": terms} if terms else {})


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
    for name, term in _terms(sim).items():
        value = saved.get("terms", {}).get(name)
        if isinstance(value, Tensor) and value.shape != torch.as_tensor(term.get_state()).shape:
            value = _spread(value, len(term.get_state()))
        if value is not None:
            term.set_state(value)
    # Schedules change rewards and commands when they are computed. Of no env, because none has
    # come to the end of an episode: nothing is promoted. (A term that cannot do this without one
    # is computed at the first reset instead.)
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        sim.curriculum_manager.compute(torch.zeros(0, dtype=torch.long, device=sim.device))
    _pause(sim.curriculum_manager)
