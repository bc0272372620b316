"""Answer one question by SkyPilot: run by the Python of SkyPilot's environment (launch.py), never imported.

    python in_sky.py VERB < question.json > answer.json

Nothing of lorasmith is imported here, since that environment has nothing of it.
"""

import io
import json
import math
import os
import re
import sys
from typing import Any

import sky  # pyright: ignore[reportMissingImports]
from sky.client import sdk  # pyright: ignore[reportMissingImports]
from sky.clouds import CloudImplementationFeatures  # pyright: ignore[reportMissingImports]
from sky.utils.registry import CLOUD_REGISTRY  # pyright: ignore[reportMissingImports]


def clouds(question: dict[str, Any]) -> dict[str, list[str]]:
    """Return the clouds that SkyPilot has credentials for, each with what it cannot do there of ``needs``."""
    found = sdk.get(sdk.enabled_clouds())
    if not found:  # SkyPilot has not looked yet
        sdk.get(sdk.check(None, False))
        found = sdk.get(sdk.enabled_clouds())
    return {cloud.lower(): _lacks(cloud, question["needs"]) for cloud in sorted(found)}


def _lacks(cloud: str, needs: list[str]) -> list[str]:
    """Return which features SkyPilot has not for ``cloud``; its optimizer would learn of some at the launch only."""
    lacking = []
    for need in needs:
        try:
            CLOUD_REGISTRY.from_str(cloud).check_features_are_supported(
                sky.Resources(), {CloudImplementationFeatures(need)}
            )
        except sky.exceptions.NotSupportedError:
            lacking.append(need)
        except ImportError:
            break  # Kubernetes' own package is missing beside this client; its API server may have it
    return lacking


def offers(question: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lowest price of each of ``machines`` (such as L4:1) in each region of ``clouds``."""
    wanted = {tuple(machine.rsplit(":", 1)) for machine in question["machines"]}
    names = "|".join(sorted(re.escape(name) for name, _ in wanted))
    listed = sdk.get(
        sdk.list_accelerators(
            name_filter=f"^({names})$", clouds=question["clouds"], all_regions=True, case_sensitive=False
        )
    )
    cheapest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in (row for rows in listed.values() for row in rows):
        price = row.spot_price if question["spot"] else row.price
        if (
            (row.accelerator_name, f"{row.accelerator_count:g}") not in wanted
            or price is None
            or math.isnan(price)
        ):
            continue
        found = {
            "cloud": row.cloud.lower(),
            "region": row.region,
            "gpu": row.accelerator_name,
            "num_gpus": int(row.accelerator_count),
            "hourly": float(price),
            "spot": question["spot"],
        }
        place = (found["cloud"], found["region"], found["gpu"], str(found["num_gpus"]))
        if place not in cheapest or price < cheapest[place]["hourly"]:
            cheapest[place] = found
    return list(cheapest.values())


def check(question: dict[str, Any]) -> str:
    """Return SkyPilot's plan for ``task``, as its optimizer prints it; nothing is rented."""
    dag = sky.Dag()
    dag.add(_task(question))
    sdk.validate(dag)
    plan = io.StringIO()
    sdk.stream_and_get(sdk.optimize(dag), output_stream=plan)
    return plan.getvalue().strip()


def launch(question: dict[str, Any]) -> None:
    """Start ``task`` under ``name``: watched by SkyPilot (``managed``), or on a machine that stays until it is idle."""
    task, name = _task(question), question["name"]
    if question["managed"]:
        request = sky.jobs.launch(task, name=name)
    else:
        request = sdk.launch(
            task, cluster_name=name, idle_minutes_to_autostop=question["idle_minutes"], down=True
        )
    sdk.stream_and_get(request)


def knows(question: dict[str, Any]) -> bool:
    """Return whether SkyPilot has a job or a machine called ``name``, in whatever state."""
    if not question["managed"]:
        return bool(sdk.get(sdk.status([question["name"]])))
    try:
        jobs, *_ = sdk.get(sky.jobs.queue_v2(refresh=False, all_users=False, name_match=question["name"]))
    except sky.exceptions.ClusterNotUpError as fault:
        return fault.cluster_status is not None  # the machine that watches jobs sleeps; None: there is none
    return any(job["job_name"] == question["name"] for job in jobs)


def _task(question: dict[str, Any]) -> Any:
    """Return the task with the values of its secrets; ``Task.update_secrets`` would lose them at the launch."""
    secrets = [(name, os.environ[name]) for name in question["task"].get("secrets", ())]
    return sky.Task.from_yaml_config(question["task"], secrets_overrides=secrets)


if __name__ == "__main__":
    sys.tracebacklimit = 0  # SkyPilot's faults say themselves what is wrong
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SkyPilot prints its progress; standard output is for the answer alone
    verbs = {"clouds": clouds, "offers": offers, "check": check, "launch": launch, "knows": knows}
    verb = verbs[sys.argv[1]]
    json.dump(verb(json.load(sys.stdin)), answer)
