"""Where cameras stand, in one form for every simulator. Imports no torch.

A pose is a position and a point to look at, in metres from the robot's root, along the world's
axes; there is no quaternion whose order (wxyz, xyzw) or convention (world, ROS, OpenGL) could be
mistaken. A camera keeps its distance to a robot that moves and does not turn with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Pose:
    """One camera."""

    position: Vector
    """Metres from the robot's root, world axes (x forward, y left, z up)."""
    target: Vector
    """What it looks at, likewise."""
    fov: float = 60.0
    """Field of view, degrees; pictures are square."""

    def frame(self) -> tuple[Vector, Vector, Vector]:
        """The camera's right, up and backward axes, unit vectors in the world: MuJoCo's, OpenGL's
        and USD's camera axes x, y, z. Straight up or down, the picture's upper edge is +x."""
        forward = _unit(_minus(self.target, self.position))
        level = math.hypot(forward[0], forward[1]) > 1e-6
        above = (0.0, 0.0, 1.0) if level else (1.0, 0.0, 0.0)
        right = _unit(_cross(forward, above))
        return right, _cross(right, forward), (-forward[0], -forward[1], -forward[2])

    def quaternion(self) -> tuple[float, float, float, float]:
        """The rotation of `frame`, as (w, x, y, z)."""
        (a, d, g), (b, e, h), (c, f, i) = self.frame()  # columns of the rotation matrix
        # Shepperd 1978: divide by the largest of the four.
        squares = (1 + a + e + i, 1 + a - e - i, 1 - a + e - i, 1 - a - e + i)
        best = squares.index(max(squares))
        s = 2 * math.sqrt(squares[best])
        return (
            (s / 4, (h - f) / s, (c - g) / s, (d - b) / s),
            ((h - f) / s, s / 4, (b + d) / s, (c + g) / s),
            ((c - g) / s, (b + d) / s, s / 4, (f + h) / s),
            ((d - b) / s, (c + g) / s, (f + h) / s, s / 4),
        )[best]


POSES = {
    "rear": Pose((-3.0, 0.0, 1.5), (0.0, 0.0, 0.2)),
    "side": Pose((0.0, -3.0, 1.0), (0.0, 0.0, 0.2)),
    "top": Pose((0.0, 0.0, 4.0), (0.0, 0.0, 0.0)),
}
"""By name, for a robot of about a metre."""


def has_its_own(task: str) -> bool:
    """Whether a task's id says that it has cameras, as Isaac Lab's do."""
    words = ("rgb", "camera", "visuomotor", "vision", "depth", "blueprint", "gr1t2")
    return any(word in task.lower() for word in words)


def poses(cameras: dict[str, Any]) -> dict[str, Pose]:
    """`env.cameras` as poses.

    Raises:
        ValueError: with a line for every mistake.
    """
    out: dict[str, Pose] = {}
    problems: list[str] = []
    for name, value in cameras.items():
        if isinstance(value, str):
            if value not in POSES:
                problems.append(f"env.cameras.{name}={value}: named poses are {', '.join(POSES)}; "
                                f"any other is env.cameras.{name}.position=[x,y,z] env.cameras."
                                f"{name}.target=[x,y,z].")  # fmt: skip
            else:
                out[name] = POSES[value]
            continue
        given = dict(value) if isinstance(value, dict) else {}
        position, target = (_vector(given.pop(k, None)) for k in ("position", "target"))
        fov = given.pop("fov", Pose.fov)
        if position is None or target is None or position == target:
            problems.append(f"env.cameras.{name}: needs position=[x,y,z] and target=[x,y,z], two "
                            "different points in metres from the robot's root.")  # fmt: skip
        elif given:
            problems.append(f"env.cameras.{name}: unknown {', '.join(map(str, given))}; known are "
                            "position, target, fov.")  # fmt: skip
        elif not isinstance(fov, int | float) or not 1 <= fov <= 170:
            problems.append(f"env.cameras.{name}.fov={fov}: must be 1 to 170 degrees.")
        else:
            out[name] = Pose(position, target, float(fov))
    if problems:
        raise ValueError("\n".join(problems))
    return out


def _vector(value: Any) -> Vector | None:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if not all(isinstance(x, int | float) for x in value):
        return None
    return float(value[0]), float(value[1]), float(value[2])


def _minus(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _cross(a: Vector, b: Vector) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _unit(a: Vector) -> Vector:
    length = math.sqrt(a[0] ** 2 + a[1] ** 2 + a[2] ** 2)
    return a[0] / length, a[1] / length, a[2] / length
