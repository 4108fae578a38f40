"""Entry: compose the configuration, check it, start the simulator, run.

    python dreamer_isaac.py                                       # cartpole, to a solved task
    python dreamer_isaac.py env.name=Isaac-Ant-v0 size=1m
    python dreamer_isaac.py mode=evaluate checkpoint=runs/Isaac-Ant-v0/<run>
    python dreamer_isaac.py --cfg                                 # print the configuration

Nothing is imported here that imports torch or a simulator, and nothing happens at module level:
spawned workers import this file again.
"""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code is 0, 1 (failed), 2 (usage), 130 or 143 (signals)."""
    from dreamer_isaac import cli

    return cli.run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
