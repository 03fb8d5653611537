"""What a wheel holds beside the code."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from engine.loader.catalogue import CATALOGUE

ROOT = Path(__file__).parent.parent
MODELS = Path("engine/loader/shipped_models")


def test_a_wheel_holds_the_models_that_ship(tmp_path: Path) -> None:
    """Built from empty files of their names: compressing the weights would take longer than all the rest."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "engine/__init__.py", "engine/loader/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shipped = {file.relative_to(ROOT) for file in (ROOT / MODELS).glob("*/*")}
    for name, entry in CATALOGUE.items():
        if entry.hub_id is None:
            assert {MODELS / name / "config.json", MODELS / name / "model.safetensors"} <= shipped
    for file in shipped:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    assert shipped <= {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
