"""What a task's curriculum has come to: read, saved and restored alike on mjlab and Isaac Lab,
whose managers are the same."""

from __future__ import annotations

from typing import Any

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


def state(sim: Any) -> dict[str, Any]:
    """What the next episodes' difficulty follows from: the terrain's levels, and the steps so far,
    which schedules go by. Empty for a task without a curriculum."""
    if not levels(sim):
        return {}
    out: dict[str, Any] = {"common_step_counter": int(sim.common_step_counter)}
    terrain = getattr(sim.scene, "terrain", None)
    if getattr(terrain, "terrain_levels", None) is not None:
        out["terrain_levels"] = terrain.terrain_levels.clone()  # type: ignore[union-attr]
    return out


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
    _pause(sim.curriculum_manager)
    sim.common_step_counter = saved["common_step_counter"]
    terrain = getattr(sim.scene, "terrain", None)
    if "terrain_levels" in saved and terrain is not None:
        terrain.terrain_levels.copy_(saved["terrain_levels"])
        terrain.env_origins.copy_(
            terrain.terrain_origins[terrain.terrain_levels, terrain.terrain_types]
        )
