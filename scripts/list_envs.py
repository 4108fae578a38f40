"""List the task ids of every simulator that is installed: `python scripts/list_envs.py [word]`."""

from __future__ import annotations

import argparse

from dreamer_isaac.config import EMBEDDED_TASKS, isaaclab_available, module_exists


def isaaclab(word: str) -> None:
    """Isaac Lab's ids; 2.x registers them only in a running Isaac Sim."""
    from dreamer_isaac.launch import isaaclab_is_3

    if not isaaclab_is_3():
        print("isaaclab  2.x lists its own: isaaclab.sh -p scripts/environments/list_envs.py")
        return
    import gymnasium  # pyright: ignore[reportMissingImports]
    import isaaclab_tasks  # noqa: F401  # pyright: ignore[reportMissingImports]

    for name in sorted(gymnasium.registry):
        if name.startswith("Isaac-") and word.lower() in name.lower():
            print(f"isaaclab  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="only ids that contain this")
    parser.add_argument("--import", dest="module", default="", help="a module with tasks of yours")
    arguments = parser.parse_args()
    if module_exists("mjlab"):
        from dreamer_isaac.envs.mjlab import load_tasks

        for name in load_tasks(arguments.module):
            if arguments.word.lower() in name.lower():
                note = "  (ported from Isaac Lab)" if name in EMBEDDED_TASKS else ""
                print(f"mjlab     {name}{note}")
    else:
        print("mjlab     not installed (bash setup-and-run.sh --build-only)")
    if isaaclab_available():
        isaaclab(arguments.word)
    else:
        print("isaaclab  not installed")


if __name__ == "__main__":
    main()
