"""Run a script of Isaac Lab's with its assets from a mirror:

    python -m dreamer_isaac.assets run [--root R] [--strict] scripts/.../train.py --task ... ...

The script and its arguments are not changed.
"""

from __future__ import annotations

import argparse
import atexit
import runpy
import sys
from pathlib import Path

from dreamer_isaac.assets.mirror import Mirror
from dreamer_isaac.assets.resolver import Resolver, install


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dreamer_isaac.assets", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=["run"])
    parser.add_argument("--root", type=Path, default=Path("offline_assets"))
    parser.add_argument("--strict", action="store_true", help="never ask the server")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    a = parser.parse_args()
    if not a.script.is_file():
        parser.error(f"{a.script} is no file")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    resolver = Resolver(Mirror(a.root), a.strict, say=say)
    install(resolver)
    atexit.register(lambda: say(resolver.report()))
    sys.argv = [str(a.script), *a.arguments]
    sys.path.insert(0, str(a.script.resolve().parent))
    runpy.run_path(str(a.script), run_name="__main__")


if __name__ == "__main__":
    main()
