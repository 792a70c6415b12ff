"""Another release of vLLM's Python files, made importable where vLLM is installed for a CPU.

`python -m benchmarks.vllm_tests.release 0.33.0 FOLDER python ...` runs a command with the Python files of a released
wheel: there was no build of vLLM 0.33 for CPUs to install. What is compiled is a stand-in: the libraries of the release
that is installed, and its torch, take the place of those that the files were released with. What calls an op that is
new or changed in that release fails, or could compute something else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

# Of what vLLM 0.33 imports on a CPU, what 0.32 does not install.
IMPORTED = ("orjson",)


def importable(version: str, folder: Path) -> Path:
    """A folder to import vLLM's release from, below another folder; it is made if it is not there.

    Args:
        version: of a wheel of vLLM's that pip finds.
        folder: to keep it in.
    """
    made = folder / f"python-{version}"
    if not made.is_dir():
        pip("download", "--only-binary", ":all:", "--dest", str(folder), f"vllm=={version}")
        (wheel,) = folder.glob(f"vllm-{version}-*.whl")
        part = folder / f"python-{version}.part"
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                if not name.endswith(".so"):
                    files.extract(name, part)
        wheel.unlink()
        pip("install", "--target", str(part), *IMPORTED)
        for library in installed().glob("*.so"):
            (part / "vllm" / library.name).symlink_to(library)
        # vLLM asks its own metadata whether it was built for a CPU.
        (metadata,) = part.glob("vllm-*.dist-info")
        lines = (metadata / "METADATA").read_text().replace(f"Version: {version}", f"Version: {version}+cpu", 1)
        (metadata / "METADATA").write_text(lines)
        metadata.rename(metadata.with_name(f"vllm-{version}+cpu.dist-info"))
        part.rename(made)
    return made


def sources(version: str, folder: Path) -> Path:
    """The unpacked source distribution of a release; it is got if it is not there.

    Nothing is built. pip asks it for its metadata, for which vLLM's setup.py needs two packages and torch.
    """
    made = folder / f"sources-{version}"
    if not made.is_dir():
        tools = folder / "tools"
        if not tools.is_dir():
            pip("install", "--target", str(tools), "setuptools-rust", "setuptools-scm", dependencies=True)
        environment = {"PYTHONPATH": str(tools), "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version}
        no_build = ("--no-binary", "vllm", "--no-build-isolation")
        pip("download", *no_build, "--dest", str(folder), f"vllm=={version}", environment=environment)
        archive, part = folder / f"vllm-{version}.tar.gz", folder / f"sources-{version}.part"
        shutil.unpack_archive(archive, part, filter="data")
        archive.unlink()
        (part / f"vllm-{version}").rename(made)
        part.rmdir()
    return made


def installed() -> Path:
    """The package `vllm` that is installed, not imported."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("benchmarks.vllm_tests: wanted vLLM; got none. pip install -e '.[vllm]'.")
    return Path(spec.origin).parent


def pip(command: str, *arguments: str, dependencies: bool = False, environment: dict[str, str] | None = None) -> None:
    """Run pip; what it says goes to the standard error output."""
    options = ("--quiet", "--no-cache-dir", *(() if dependencies else ("--no-deps",)))
    subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pip", command, *options, *arguments],
        check=True,
        stdout=sys.stderr,
        env=os.environ | (environment or {}),
    )


def main() -> None:
    """Run a command with a release, which comes from the registry if the folder has not got it."""
    version, folder, *command = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [str(importable(version, Path(folder).absolute())), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    raise SystemExit(subprocess.run(command, env=environment).returncode)  # noqa: S603


if __name__ == "__main__":
    main()
