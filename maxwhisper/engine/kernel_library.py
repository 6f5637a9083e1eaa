"""The Mojo package of the operations that graphs use beside MAX's own, compiled and kept."""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

from max.graph import KernelLibrary
from mojo.run import subprocess_run_mojo

from ..errors import OptionError
from ..files import replacing
from .folders import cache_folder
from .process import announced, find_place_for_max_cache

KERNELS = Path(__file__).parents[1] / "kernels"
"""The package's sources. MAX compiles a graph again whenever they change."""

FOLDER_DESCRIPTOR = 900
"""Where `path_for_max` opens the package's folder: far behind what programs open, and below the usual limit of 1024."""


@cache
def kernel_library() -> KernelLibrary:
    """Returns KERNELS compiled: once, where a graph that is given the sources would compile them in every process.

    Raises as `compile_kernels` does.
    """
    library = KernelLibrary()
    library.load_paths([path_for_max(kernel_package())])
    return library


def kernel_package() -> Path:
    """Returns the file that holds KERNELS compiled, in the cache folder `kernels`, named by a hash of the sources.

    Raises as `compile_kernels` does, if it is not there yet.
    """
    hashed = hashlib.sha256(version("mojo-compiler").encode())
    for source in sorted(KERNELS.glob("*.mojo")):
        hashed.update(f"{source.name}\n{code(source)}".encode())
    package = cache_folder("kernels").resolve() / f"maxwhisper_kernels_{hashed.hexdigest()[:16]}.mojoc"
    if not package.exists():
        compile_kernels(package)
    return package


def code(path: Path) -> str:
    """Returns the lines of a file of KERNELS without comments, docstrings and empty lines."""
    text = re.sub(r'(?s)"""(?:\\.|.)*?"""', "", path.read_text())
    # Behind quotes a "#" may be none of a comment.
    lines = (line if '"' in line.partition("#")[0] else line.partition("#")[0] for line in text.splitlines())
    return "\n".join(line.rstrip() for line in lines if line.strip())


def path_for_max(package: Path) -> Path:
    """Returns a path of the package that is the same wherever its folder lies: by its path MAX's compile cache knows
    kernels again, and caches are copied, mounted elsewhere, and shared by users. Where that cannot be, its own path."""
    if sys.platform != "linux":
        return package
    descriptor = os.open(package.parent, os.O_PATH)
    try:
        stays_open = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, FOLDER_DESCRIPTOR)
    except OSError:  # this process may have fewer files open
        return package
    finally:
        os.close(descriptor)
    return Path(f"/proc/self/fd/{stays_open}", package.name)


def compile_kernels(package: Path) -> None:
    """Compiles KERNELS into a file that appears when it is complete.

    Raises OptionError if it cannot be written, RuntimeError with the compiler's words if the sources are wrong.
    """
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        with replacing(package) as compiled:  # the name of the file becomes that of the package
            find_place_for_max_cache()  # the compiler keeps things there too
            arguments = ["precompile", str(KERNELS), "-o", str(compiled)]
            with announced("compiling kernels: most of a minute the first time"):
                subprocess_run_mojo(arguments, check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{KERNELS} does not compile:\n{error.stderr.decode()}") from error
    except OSError as error:
        raise OptionError(f"{package.parent}: compiled kernels cannot be kept there: {error}") from error
