"""What `make gpu-bundle` has made, on a machine without network: checked, unpacked, installed.

    python3 -m reference.gpu_run.offline BUNDLE

A bundle is a folder: `bundle.json`, the project, and the parts of one archive, of wheels, artifacts and kernels. These
are unpacked into it, and installed into an environment of its own, which finds what the machine's Python has besides.
"""

import hashlib
import io
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST, UNPACKED = "bundle.json", "unpacked"
DONE = "installed"
"""A file of what was unpacked, which holds the manifest of what was installed."""


class BundleError(Exception):
    """A bundle cannot be used; the message names the file or the field, and what was expected."""


def read(bundle: Path) -> dict[str, Any]:
    """Returns the manifest of a bundle; raises BundleError for none."""
    try:
        manifest = json.loads((bundle / MANIFEST).read_text())
        kinds = {"python": str, "commit": str, "has": list, "parts": dict}
        return {name: kind(manifest[name]) for name, kind in kinds.items()}
    except OSError as error:
        raise BundleError(f"{bundle / MANIFEST}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{bundle / MANIFEST}: is no manifest of a bundle") from error


def check(bundle: Path) -> None:
    """Raises BundleError if parts are missing, or if it is for another Python, or for one that has more packages."""
    manifest = read(bundle)
    for name, part in manifest["parts"].items():
        path = bundle / name
        size = path.stat().st_size if path.exists() else None
        if size != part["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise BundleError(f"{path}: {found}, expected {part['bytes']} bytes")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != here:
        raise BundleError(f"{bundle}: python is {manifest['python']}, expected that of {sys.executable}, {here}")
    if missing := [name for name in manifest["has"] if not there(name)]:
        raise BundleError(f"{bundle}: {', '.join(missing)}: neither in the bundle nor in {sys.executable}")


def there(package: str) -> bool:
    """Returns whether this Python has a package."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def python(bundle: Path) -> Path:
    """Returns the interpreter that has what the bundle brings, once it is installed."""
    return bundle / UNPACKED / "venv" / "bin" / "python"


class Parts(io.RawIOBase):
    """The parts of a bundle, checked and read as one file."""

    def __init__(self, bundle: Path, parts: dict[str, Any]):
        self.bundle, self.left, self.content = bundle, list(parts.items()), io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (count := self.content.readinto(buffer)) and self.left:
            name, part = self.left.pop(0)
            content = (self.bundle / name).read_bytes()
            if (found := hashlib.sha256(content).hexdigest()) != part["sha256"]:
                raise BundleError(f"{self.bundle / name}: sha256 is {found}, expected {part['sha256']}")
            self.content = io.BytesIO(content)
        return count


def unpack(bundle: Path, into: Path) -> None:
    """Unpacks the archive that the parts are of, and then those in it, on as many cores as there are."""
    parts = io.BufferedReader(Parts(bundle, read(bundle)["parts"]), 2**20)
    with tarfile.open(fileobj=parts, mode="r|") as archive:
        extract(archive, into)
    with ThreadPoolExecutor() as threads:
        list(threads.map(unpack_one, sorted(into.glob("*.tar.xz"))))


def unpack_one(packed: Path) -> None:
    with tarfile.open(packed) as archive:
        extract(archive, packed.parent)
    packed.unlink()


def extract(archive: tarfile.TarFile, into: Path) -> None:
    if hasattr(tarfile, "data_filter"):  # Pythons of 2022 have none
        archive.extraction_filter = tarfile.data_filter
    archive.extractall(into)


def install(into: Path) -> None:
    """Makes the environment, and installs all wheels into it by this Python's pip, from nowhere else."""
    venv.create(into / "venv", with_pip=False, symlinks=True)
    own = next((into / "venv" / "lib").glob("python3*")) / "site-packages"
    # Behind its own: what is brought comes before what is there. A .pth line may only be one statement.
    theirs = [folder for folder in [*site.getsitepackages(), site.getusersitepackages()] if Path(folder).is_dir()]
    (own / "machine.pth").write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in theirs))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    quiet = ["--disable-pip-version-check", "--no-warn-script-location", "--no-cache-dir"]
    wheels = [str(wheel) for wheel in sorted((into / "wheels").glob("*.whl"))]
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    subprocess.run([*pip, *quiet, "--target", str(own), *wheels], check=True, env=environment)


def main() -> int:
    bundle = Path(sys.argv[1]).absolute()
    into, manifest = bundle / UNPACKED, (bundle / MANIFEST).read_text()
    try:
        check(bundle)
        if (into / DONE).exists() and (into / DONE).read_text() == manifest:
            print(f"{into}: installed before")
            return 0
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        unpack(bundle, into)
        install(into)
        number = len(list((into / "wheels").iterdir()))
        shutil.rmtree(into / "wheels")
        (into / DONE).write_text(manifest)
    except (BundleError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{number} wheels installed into {into / 'venv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
