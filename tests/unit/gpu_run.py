"""What tests of reference/gpu_run share: folders of artifacts, bundles, wheels."""

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reference.gpu_run import held
from reference.gpu_run.offline import MANIFEST

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def artifacts(folder: Path, target: str, size: str = "fixture", **units: Sequence[str]) -> Path:
    """Writes a manifest of artifacts: by unit, the precisions that are held."""
    names = ("n_audio_state", "n_audio_layer", "n_text_layer")
    dims = dict(zip(names, held.SIZES[size], strict=True))
    entries = [
        {"unit": unit, "compute": dtype, "dims": dims, "file": f"{unit}.mef"}
        for unit, dtypes in units.items()
        for dtype in dtypes
    ]
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"target": target, "artifacts": entries}))
    return folder


def bundle_of(folder: Path, manifest: dict[str, Any]) -> Path:
    """Writes the manifest of a bundle without parts, for this Python, but for what is given."""
    bundle = folder / "bundle"
    bundle.mkdir()
    (bundle / MANIFEST).write_text(json.dumps({"python": HERE, "commit": "1", "has": [], "parts": {}} | manifest))
    return bundle


def wheel(folder: Path, name: str, tag: str = "py3-none-any", needs: Sequence[str] = (), **files: str) -> Path:
    """Writes a wheel of version 1 with modules, by name, and requirements."""
    path = folder / f"{name.replace('-', '_')}-1-{tag}.whl"
    required = "".join(f"Requires-Dist: {need}\n" for need in needs)
    information = f"{name.replace('-', '_')}-1.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for module, text in files.items():
            archive.writestr(module.replace("__", "/"), text)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{required}")
        archive.writestr(f"{information}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{information}/RECORD", "")
    return path
