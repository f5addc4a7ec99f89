"""Runs `smoke.py` on each version of Python that can be found, in an environment of its own; prints a line for each.

An environment is made once, in `build/smoke-X.Y`, with the library and its dependencies but torch and transformers, as
`constraints.txt` pins them; where that has no wheel for a version of Python, the newest release is taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
LEFT_OUT = ("torch", "transformers")


def interpreters(version: str) -> Iterator[Path]:
    """Where a version may be: on the PATH, where pyenv has shims even for what it does not run, and in its folder."""
    on_path = shutil.which(f"python{version}")
    if on_path is not None:
        yield Path(on_path)
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(root.glob(f"versions/{version}.*/bin/python{version}"))


def works(interpreter: Path) -> bool:
    """Whether there is an interpreter, and not only a shim."""
    return subprocess.run([interpreter, "-c", ""], capture_output=True, check=False).returncode == 0


def dependencies() -> list[str]:
    """What the library needs without a model."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [each for each in project["dependencies"] if not each.startswith(LEFT_OUT)]


def environment(version: str, interpreter: Path) -> tuple[Path, str]:
    """The Python of an environment that is ready, and what there is to say about it."""
    place = ROOT / "build" / f"smoke-{version}"
    python, ready = place / "bin" / "python", place / ".ready"
    recipe = "\n".join([*dependencies(), (ROOT / "constraints.txt").read_text(encoding="utf-8")])
    if ready.exists() and ready.read_text(encoding="utf-8").endswith(recipe):
        return python, ready.read_text(encoding="utf-8").partition("\n")[0]
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", "--without-pip", place], check=True)
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "install",
        "--quiet",
    ]
    install += ["--no-compile", "--only-binary=:all:"]
    pinned = subprocess.run(
        [*install, "--constraint", ROOT / "constraints.txt", *dependencies()], capture_output=True, check=False
    )
    said = ""
    if pinned.returncode:
        subprocess.run([*install, *dependencies()], check=True)
        said = ", unpinned: " + pinned.stderr.decode().strip().splitlines()[-1]
    subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True)
    ready.write_text(f"{said}\n{recipe}", encoding="utf-8")
    return python, said


def smoke(version: str) -> bool:
    """Run one version, print what came of it; whether all went well. A version that is not there is no failure."""
    interpreter = next(filter(works, interpreters(version)), None)
    if interpreter is None:
        print(f"{version}: not here")
        return True
    begin = time.monotonic()
    try:
        python, said = environment(version, interpreter)
    except subprocess.CalledProcessError as error:
        print(f"{version}: no environment could be made: {error}")
        return False
    done = subprocess.run([python, "-W", "error", ROOT / "tests" / "package" / "smoke.py"], cwd=ROOT, check=False)
    what = "failed" if done.returncode else "passed"
    print(f"{version}: {what} in {time.monotonic() - begin:.0f} s{said}", flush=True)
    return not done.returncode


if __name__ == "__main__":
    results = [smoke(version) for version in VERSIONS]
    sys.exit(not all(results))
