"""The folder that is uploaded: the run file, what it names, this package, and the versions it runs with here."""

import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from lorasmith.errors import SettingsError

# Settings that may name a file or folder of this machine.
_PATHS = (
    ("data", "train"),
    ("data", "validation"),
    ("base", "model"),
    ("prompt", "recipe"),
    ("report", "data"),
)
# Settings' words that mean what they say, whatever files of that name there are.
_WORDS = {"base.model": ("smollm2-135m",), "prompt.recipe": ("auto", "alpaca", "chat", "text")}
# SkyPilot uploads nothing that a .gitignore or .skyignore in any folder names; .git holds a clone's files once more.
_GIT = (".git", ".gitignore", ".skyignore")
# Where things are on this machine says nothing about the rented one.
_HERE_ONLY = (("run", "root"), ("run", "name"), ("data", "cache_dir"))


def fill_workdir(folder: Path, settings: Mapping[str, Mapping[str, Any]], extras: Iterable[str]) -> None:
    """Write into the empty ``folder`` what the rented machine needs for the run of ``settings``.

    Raises:
        SettingsError: base.device or a path is right on this machine only.
    """
    kept = {
        section: {key: value for key, value in values.items() if (section, key) not in _HERE_ONLY}
        for section, values in settings.items()
    }
    for section, key in _PATHS:
        value = kept.get(section, {}).get(key)
        if isinstance(value, list):
            kept[section][key] = [_upload(folder, one, f"{section}.{key}") for one in value]
        elif isinstance(value, str):
            kept[section][key] = _upload(folder, value, f"{section}.{key}")
    device = kept.get("base", {}).get("device", "auto")
    if device not in ("auto", "cuda"):
        raise SettingsError(
            f"base.device is {device}, which a rented GPU is not. Launch it with base.device=auto."
        )
    text = yaml.safe_dump({section: values for section, values in kept.items() if values}, sort_keys=False)
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    package = Path(__file__).resolve().parents[1]
    shutil.copytree(package, folder / "lorasmith", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements(extras)))
    (folder / "constraints.txt").write_text("".join(f"{line}\n" for line in constraints()))


def requirements(extras: Iterable[str]) -> list[str]:
    """Return what lorasmith requires, with these of its extras."""
    found = []
    for text in metadata.requires("lorasmith") or ():
        needed = Requirement(text)
        if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.append(f"{needed.name}{_square(needed.extras)}{needed.specifier}")
    return sorted(set(found))


def constraints() -> list[str]:
    """Return name==version of everything installed here; a build such as +cpu is left to the rented machine."""
    found = {found.name.lower(): found.version.partition("+")[0] for found in metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != "lorasmith"]


def _square(extras: Iterable[str]) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""


def _upload(folder: Path, value: str, setting: str) -> str:
    """Copy the file or folder that ``value`` names and return its name there; other values stay as they are."""
    source = Path(value).expanduser()
    if value in _WORDS.get(setting, ()):
        return value
    if not source.exists():
        if source.is_absolute():
            raise SettingsError(
                f"{setting} is {value}, which is not on this machine, so it cannot be uploaded."
            )
        return value  # a Hub id
    target = folder / setting / source.resolve().name
    number = 1
    while target.exists():  # of several in a list, two may have one name
        number += 1
        target = folder / f"{setting}-{number}" / target.name
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_GIT))
    else:
        shutil.copyfile(source, target)
    return target.relative_to(folder).as_posix()
