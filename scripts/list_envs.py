"""List the task ids of every simulator that is installed: `python scripts/list_envs.py [word]`."""

from __future__ import annotations

import argparse

from dreamer_isaac.config import EMBEDDED_TASKS, isaaclab_available, module_exists


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
        print("isaaclab  installed; its backend is not built yet")
    else:
        print("isaaclab  not installed")


if __name__ == "__main__":
    main()
