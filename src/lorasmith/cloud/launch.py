"""SkyPilot, called in an environment of its own: its pins (click<8.2, uvicorn<0.36) exclude ours.

It is looked for at LORASMITH_SKY (an environment, or its bin/sky), on the PATH, beside this Python, then where
``lorasmith launch --install`` puts it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorasmith.cloud.quote import Offer
from lorasmith.cloud.task import AUTOSTOP_MINUTES, Launch
from lorasmith.errors import CloudError

VARIABLE = "LORASMITH_SKY"
_REQUIREMENT = "skypilot[aws,gcp,kubernetes]>=0.14,<0.15"
_IN_SKY = Path(__file__).with_name("in_sky.py")
_LINES_OF_A_FAULT = 8
# What every launch needs of a cloud, as SkyPilot names it and in words.
_NEEDS = {"storage_mounting": "mounted buckets", "autodown": "machines that end by themselves"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def private_environment() -> Path:
    """Return where ``lorasmith launch --install`` puts SkyPilot."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lorasmith" / "sky"


def install(tell: Callable[[str], None]) -> Path:
    """Make SkyPilot's environment and return its folder; ``tell`` gets each command before it runs.

    Raises:
        CloudError: a command failed; what it says has been shown.
    """
    folder = private_environment()
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    for words in ([sys.executable, "-m", "venv", str(folder)], [*pip, _REQUIREMENT]):
        tell(shlex.join(words))
        if code := subprocess.run(words, check=False).returncode:
            raise CloudError(f"The last command failed with exit code {code}; what it says stands above.")
    return folder


def find_sky() -> Path:
    """Return the ``sky`` command of SkyPilot's environment.

    Raises:
        CloudError: there is none; names the commands that make one.
    """
    if named := os.environ.get(VARIABLE):
        path = Path(named).expanduser()
        sky = path / "bin" / "sky" if path.is_dir() else path
        if not sky.is_file():
            raise CloudError(
                f"{VARIABLE} is {named}, and there is no {sky}. Name SkyPilot's environment, or unset it."
            )
        return sky
    places = (os.environ.get("PATH", ""), Path(sys.executable).parent, private_environment() / "bin")
    found = shutil.which("sky", path=os.pathsep.join(map(str, places)))
    if found is None:
        raise CloudError(
            "SkyPilot, which rents the machines, is not installed. It needs an environment of its own:\n"
            "  lorasmith launch --install\n"
            f"or name yours in {VARIABLE}. Then give it your cloud's credentials; sky check says how."
        )
    return Path(found)


def run_sky(words: Sequence[str]) -> int:
    """Run the ``sky`` command with everything shown; return its exit code."""
    return subprocess.run([str(find_sky()), *words], env=_environment(), check=False).returncode


def list_clouds(*, serves: bool, nodes: int) -> dict[str, str]:
    """Return the clouds that SkyPilot has credentials for, each with what it cannot do there that a launch needs.

    Raises:
        CloudError: there is none.
    """
    needs = dict(_NEEDS)
    if nodes > 1:
        needs["multi-node"] = "runs on several machines"
    if serves:
        needs["open_ports"] = "open ports"
    found: dict[str, list[str]] = _ask("clouds", {"needs": list(needs)})
    if not found:
        raise CloudError(
            f"SkyPilot has no credentials for any cloud. See what is missing with: {find_sky()} check"
        )
    return {cloud: " and no ".join(needs[lack] for lack in lacks) for cloud, lacks in found.items()}


def find_offers(machines: Sequence[str], clouds: Sequence[str], *, spot: bool) -> list[Offer]:
    """Return what the catalog has of ``machines`` (such as L4:1), the cheapest of each region."""
    found = _ask("offers", {"machines": list(machines), "clouds": list(clouds), "spot": spot})
    return [Offer(**offer) for offer in found]


def check_task(task: dict[str, Any]) -> str:
    """Return SkyPilot's plan for ``task``, in its own words; nothing is rented.

    Raises:
        CloudError: SkyPilot refuses the task, or finds no such machine.
    """
    return _COLOUR.sub("", _ask("check", {"task": task}))


def start(launch: Launch, task: dict[str, Any]) -> None:
    """Hand ``task`` to SkyPilot and return when it has been taken; its progress is shown.

    Raises:
        CloudError: SkyPilot refuses, or rents nothing; :func:`knows` says whether something has come of it.
    """
    question = {
        "task": task,
        "name": launch.job,
        "managed": launch.is_managed,
        "idle_minutes": AUTOSTOP_MINUTES,
    }
    _ask("launch", question, shows=True)


def knows(launch: Launch) -> bool:
    """Return whether SkyPilot has a job or a machine of ``launch``; True where it cannot be asked."""
    try:
        return _ask("knows", {"name": launch.job, "managed": launch.is_managed})
    except CloudError:
        return True


def _ask(verb: str, question: dict[str, Any], *, shows: bool = False) -> Any:
    python = find_sky().resolve().with_name("python")
    done = subprocess.run(
        [str(python), str(_IN_SKY), verb],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        stderr=None if shows else subprocess.PIPE,
        text=True,
        env=_environment(),
        check=False,
    )
    if done.returncode:
        words = _COLOUR.sub("", done.stderr or "")
        said = [line for line in words.splitlines() if line.strip()][-_LINES_OF_A_FAULT:]
        raise CloudError(
            "\n".join(["SkyPilot failed" + (":" if said else "; what it says stands above."), *said])
        )
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"} | ours
