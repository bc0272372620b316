"""Push and pull through the real huggingface_hub client, against a small Hub on this machine (hub.py)."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub import OWNER, READS, WRITES, FakeHub, Repository
from lorasmith.cli.main import main
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.data.sources import open_source
from lorasmith.errors import AdapterError, HubError, RunError
from lorasmith.export.card import write_card
from lorasmith.export.chat_template import chat_template
from lorasmith.export.merge import merge
from lorasmith.export.push import prepare, refuse_findings, send
from lorasmith.files import find_damage, write_checksums
from lorasmith.generation.chat import open_chat
from lorasmith.model.found import find_adapted, find_model
from lorasmith.model.hub import pull_adapter, reads_as_hub_id
from lorasmith.model.run_record import read_run_record, write_run_record
from tests.export.test_merge import QUESTIONS

PLACE = f"{OWNER}/faq"

# httpx's notice to huggingface_hub, on each upload by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the fake Hub takes files by LFS
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda seconds: None
    )  # between its attempts
    monkeypatch.setenv("HF_TOKEN", WRITES)
    yield hub
    hub.stop()


def push(run, place=PLACE, *, is_public=False, overwrite=False, **what):
    with prepare(run, place, **what) as parcel:
        return send(parcel, place, is_public=is_public, overwrite=overwrite)


@pytest.fixture
def run(tmp_path, trained_run):
    return shutil.copytree(trained_run, tmp_path / "faq")


@pytest.fixture(scope="module")
def merged_once(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge(trained_run, folder, prompts=QUESTIONS, records_place=False)
    return folder


@pytest.fixture
def merged(merged_once, tmp_path):
    return shutil.copytree(merged_once, tmp_path / "merged")


def test_an_adapter_comes_back_equal_and_is_asked_by_its_recipe(hub, run, tiny_base_folder):
    pushed = push(run)
    repository = hub.repositories[f"models/{PLACE}"]
    assert repository.private
    assert sorted(repository.files) == [
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "run.json",
    ]  # fmt: skip
    assert pushed.commit == repository.commits[-1]
    here, back = find_model(run), find_model(PLACE, base=str(tiny_base_folder))
    assert back.name == PLACE
    assert back.recipe == here.recipe
    assert repository.commits[-1][:12] in back.notes[0]
    ours, theirs = (
        load_file(found.adapter / "adapter_model.safetensors") for found in (here, back) if found.adapter
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    question, base = QUESTIONS[0][0].content, str(tiny_base_folder)
    answers = [
        open_chat(str(place), base=base, device="cpu", dtype="float32").ask(question).text
        for place in (run, PLACE)
    ]
    assert answers[0] == answers[1]
    assert find_adapted(Path(PLACE), base=base).adapter == back.adapter
    with pytest.raises(AdapterError, match=r"a folder that is not on the Hub\. Pass where that model lies"):
        find_model(PLACE)


def test_nothing_of_this_machine_is_published(hub, run, tmp_path):
    push(run)
    for name, (content, _) in hub.repositories[f"models/{PLACE}"].files.items():
        assert str(tmp_path.parent.parent).encode() not in content, name


def test_a_pushed_card_names_no_place_of_this_machine_and_no_file_that_stays_here(run, tmp_path):
    def pushed_card():
        with prepare(run, PLACE) as parcel:
            return (parcel.folder / "README.md").read_text()

    assert "nor what the model forgot.\n" in pushed_card()
    count, text = {"right": {"k": 1, "n": 2}}, {"perplexity": 3.0}
    report = {
        "schema_version": 1,
        "verdict": {"sentence": "Ship it.", "reasons": []},
        "held_out": None,
        "trained": None,
        "probe": {"base": count, "tuned": count, "base_text": text, "tuned_text": text},
        "notes": [f"The training data {tmp_path}/of anna/faq.json has changed since the run and/or the 1/2."],
    }
    (run / "report.json").write_text(json.dumps(report))
    write_card(run)
    assert "`report.html`" in (run / "README.md").read_text()
    card = pushed_card()
    assert "report." not in card
    assert "**Note:** The training data of anna/faq.json has changed since the run and/or the 1/2." in card


def test_a_card_offers_ollama_only_where_the_base_can_be_exported(run, tmp_path):
    def card():
        with prepare(run, PLACE) as parcel:
            return (parcel.folder / "README.md").read_text()

    assert f"lorasmith export --run {PLACE} --to ollama" in card()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen2"}')
    record = read_run_record(run)
    base = replace(record.base, id=str(tmp_path / "base"))
    write_run_record(run, record.model_copy(update={"base": base}))
    assert "ollama" not in card()
    assert f"--run {PLACE}" in card()


def test_a_proven_merge_opens_as_a_model_with_its_recipe(hub, run, merged):
    push(run, merged=merged)
    back = find_model(PLACE)
    assert back.adapter is None
    assert back.recipe == find_model(run).recipe
    assert back.notes == ()
    here, there = (AutoModelForCausalLM.from_pretrained(f) for f in (merged, back.base.folder))
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))
    card = hub.repositories[f"models/{PLACE}"].files["README.md"][0].decode()
    assert "library_name: transformers" in card
    assert "A LoRA adapter, merged into" in card


def test_a_model_that_was_trained_whole_goes_with_the_trained_template(run, tiny_base_folder, tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)
    record = read_run_record(run)
    settings = {**record.settings, "method": {"name": "full"}}
    write_run_record(run, record.model_copy(update={"settings": settings, "recipe": recipe.to_json()}))
    shutil.copytree(tiny_base_folder, run / "model")
    write_checksums(run / "model")
    own = (run / "model" / "chat_template.jinja").read_text()
    with prepare(run, PLACE) as parcel:
        assert (parcel.folder / "chat_template.jinja").read_text() == chat_template(recipe) != own
        assert find_damage(parcel.folder, needed=("chat_template.jinja", "lorasmith.json")) == []
    assert (run / "model" / "chat_template.jinja").read_text() == own
    assert find_damage(run / "model", needed=("chat_template.jinja",)) == []


def test_an_unproven_or_changed_or_foreign_merge_is_refused(run, merged):
    def refused(text):
        with pytest.raises(HubError, match=text), prepare(run, PLACE, merged=merged):
            pass

    weights = load_file(merged / "model.safetensors")
    save_file(
        {**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, merged / "model.safetensors"
    )
    refused("have changed since they were proven")
    adapter = run / "adapter" / "adapter_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(adapter).items()}, adapter)
    refused("was merged from another adapter")
    proof = json.loads((merged / "merge_proof.json").read_text())
    (merged / "merge_proof.json").write_text(json.dumps({**proof, "faults": ["logits part"]}))
    refused("proof of .* failed.*logits part")
    (merged / "merge_proof.json").unlink()
    refused("holds no proof")


def test_an_adapter_with_nan_and_an_unfinished_run_are_refused(run):
    record = read_run_record(run)
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    key = next(iter(weights))
    weights[key][0, 0] = float("nan")
    save_file(weights, run / "adapter" / "adapter_model.safetensors")
    (run / "adapter" / "SHA256SUMS").unlink()
    write_checksums(run / "adapter")
    with pytest.raises(AdapterError, match="NaN"), prepare(run, PLACE):
        pass
    write_run_record(run, record.model_copy(update={"result": None}))
    way_out = f"to its end. Finish it: lorasmith train RUN.yaml --name {run.name} --resume"
    with pytest.raises(HubError, match=way_out), prepare(run, PLACE):
        pass


def test_the_data_are_pushed_as_a_data_set(hub, run):
    push(run, data=True)
    files = hub.repositories[f"datasets/{PLACE}"].files
    assert sorted(files) == ["README.md", "faq.json", "lorasmith.json"]
    assert len(json.loads(files["faq.json"][0])) == 24
    assert "path:" in files["README.md"][0].decode(), "so that lorasmith.json is not read as rows"
    push(run, data=True, license="mit")  # what is there is lorasmith's own
    assert len(hub.repositories[f"datasets/{PLACE}"].messages) == 2
    record = read_run_record(run)
    write_run_record(run, record.model_copy(update={"data": {**record.data, "fingerprint": "other"}}))
    with pytest.raises(HubError, match="have changed since the run faq"), prepare(run, PLACE, data=True):
        pass


def test_a_readme_among_the_texts_is_pushed_and_not_written_over(run, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("README.md", "one.txt"):
        (notes / name).write_text(f"The words of {name}.")
    record = read_run_record(run)
    settings = {**record.settings, "data": {**record.settings["data"], "train": str(notes)}}
    fingerprint = open_source(str(notes), kind="documents").fingerprint()
    data = {**record.data, "kind": "documents", "fingerprint": fingerprint}
    write_run_record(run, record.model_copy(update={"settings": settings, "data": data}))
    with prepare(run, PLACE, data=True) as parcel:
        assert [name for name, _ in parcel.files] == [
            "README.md",
            "data/README.md",
            "data/one.txt",
            "lorasmith.json",
        ]
        assert (parcel.folder / "data" / "README.md").read_text() == "The words of README.md."
        assert "data/one.txt" in (parcel.folder / "README.md").read_text()
    assert (notes / "README.md").read_text() == "The words of README.md."


def test_keys_and_addresses_in_the_data_are_shown_and_stop_it(run, tmp_path):
    record = read_run_record(run)
    key = "hf_" + "a" * 34
    rows = [{"instruction": "Who?", "output": "anna@example.org"}, {"instruction": "Key?", "output": key}]
    (tmp_path / "bad.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = {**record.settings["data"], "train": str(tmp_path / "bad.jsonl")}
    write_run_record(run, record.model_copy(update={"settings": {**record.settings, "data": data}}))
    with prepare(run, PLACE) as parcel, pytest.raises(HubError) as fault:
        refuse_findings(parcel)
    assert "bad.jsonl:1: an e-mail address (anna@example.org)" in str(fault.value)
    assert "bad.jsonl:2: a Hugging Face token (hf_aaaaa...)" in str(fault.value)
    assert key not in str(fault.value)


@pytest.mark.parametrize(
    ("token", "place", "text"),
    [
        (
            "hf_wrong",
            PLACE,
            "not logged in to the Hub, or your token is no longer valid. Run: lorasmith login",
        ),
        (READS, PLACE, "The Hub forbids it for anna/faq: your token may not do that there"),
        (WRITES, "other/faq", "don't have the rights to write under other"),
        (WRITES, "anna/faq..", "is no name of the Hub"),
        (WRITES, "faq", r"faq has no owner: a place on the Hub is OWNER/NAME, such as anna/faq\."),
    ],
)
def test_a_refusal_says_the_way_out(hub, run, monkeypatch, token, place, text):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=text):
        push(run, place)
    assert not hub.repositories


def test_a_taken_place_is_spared(hub, run):
    key = f"models/{PLACE}"
    hub.repositories[key] = Repository(False)
    with pytest.raises(HubError, match="there already, and public"):
        push(run)
    hub.repositories[key] = Repository(True, {"thesis.pdf": (b"x", False)})
    with pytest.raises(HubError, match=r"holds 1 files that lorasmith did not push, such as thesis\.pdf"):
        push(run)
    push(run, overwrite=True)
    assert {"thesis.pdf", "run.json"} <= hub.repositories[key].files.keys()


def test_a_second_push_replaces_the_first_and_what_it_leaves_out(hub, run, merged):
    push(run, merged=merged)
    files = hub.repositories[f"models/{PLACE}"].files
    assert {"config.json", "tokenizer.json", "merge_proof.json"} < files.keys()
    files["notes.txt"] = (b"the user's own", False)
    push(run)
    files = hub.repositories[f"models/{PLACE}"].files
    assert sorted(files) == [
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "notes.txt", "run.json",
    ]  # fmt: skip
    files["tokenizer.json"] = (b"put beside the adapter by hand", False)
    push(run)
    assert "tokenizer.json" in hub.repositories[f"models/{PLACE}"].files
    assert len(hub.repositories[f"models/{PLACE}"].messages) == 2


@pytest.mark.parametrize("status", [409, 412])
def test_somebody_elses_commit_in_between_is_not_overwritten(hub, run, status):
    push(run)
    before = dict(hub.repositories[f"models/{PLACE}"].files)
    hub.conflict = status
    with pytest.raises(
        HubError, match=r"Something else changed anna/faq.* The Hub says: A commit has happened"
    ):
        push(run, license="mit")
    assert hub.repositories[f"models/{PLACE}"].files == before


def test_a_repository_made_by_somebody_else_in_between_is_not_written_to(hub, run):
    hub.is_made_meanwhile = True
    with pytest.raises(HubError, match=r"Something else changed anna/faq.* You already created this repo"):
        push(run)
    assert not hub.repositories[f"models/{PLACE}"].files


def test_a_data_set_of_the_same_name_is_another_repository(hub, run):
    hub.repositories[f"datasets/{PLACE}"] = Repository(False, {"rows.csv": (b"x", False)})
    push(run)
    assert "run.json" in hub.repositories[f"models/{PLACE}"].files
    assert hub.repositories[f"datasets/{PLACE}"].files.keys() == {"rows.csv"}


def test_a_broken_connection_is_tried_again_and_sends_only_what_is_missing(hub, run):
    hub.breaks = 2
    push(run)
    uploads = [line for line in hub.seen if line.startswith("PUT")]
    assert len(uploads) == 3  # two broken off, one whole
    hub.seen.clear()
    push(run)
    assert not [line for line in hub.seen if line.startswith("PUT")]


def test_a_connection_that_stays_broken_leaves_no_half_model(hub, run):
    hub.breaks = 1000
    with pytest.raises(HubError, match="The connection to the Hub broke off for anna/faq"):
        push(run)
    assert not hub.repositories[f"models/{PLACE}"].files
    hub.breaks = 0
    push(run)
    assert "adapter_model.safetensors" in hub.repositories[f"models/{PLACE}"].files


def test_a_card_that_the_hub_refuses_stops_the_push(hub, run):
    with pytest.raises(HubError, match="license"):
        push(run, license="nonsense")


def test_a_pulled_run_that_wants_python_code_is_refused(hub, run, tiny_base_folder):
    record = read_run_record(run)
    base = {**record.settings["base"], "trust_remote_code": True}
    write_run_record(run, record.model_copy(update={"settings": {**record.settings, "base": base}}))
    push(run)
    with pytest.raises(AdapterError, match="not run on the word of a download"):
        find_model(PLACE, base=str(tiny_base_folder))


def test_a_private_adapter_needs_a_login_and_a_copy_needs_no_hub(hub, run, monkeypatch):
    push(run)
    monkeypatch.delenv("HF_TOKEN")
    assert pull_adapter(PLACE, print) is None
    monkeypatch.setenv("HF_TOKEN", READS)
    folder = pull_adapter(PLACE, print)
    assert folder
    hub.repositories.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_adapter(PLACE, print) == folder


def test_what_reads_as_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reads_as_hub_id("anna/faq")
    assert not reads_as_hub_id("runs/faq")  # a run, named in the wrong folder
    (tmp_path / "here").mkdir()
    assert not reads_as_hub_id("here/faq")
    for text in ("faq", "../faq", "/anna/faq", "a/b/c", "anna/faq..x/"):
        assert not reads_as_hub_id(text)


@pytest.mark.parametrize("name", ["nowhere", "runs/nowhere", "../nowhere"])
def test_what_is_no_name_of_the_hub_is_not_looked_for_there(hub, tmp_path, monkeypatch, name):
    (tmp_path / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "down")  # ../nowhere: no runs of other tests beside it
    with pytest.raises(RunError, match=f"{name} is not there. A run folder holds run.json"):
        find_model(name)
    assert not hub.seen


def test_the_command_lists_what_it_sends_and_a_dry_run_sends_nothing(hub, run, capsys):
    words = ["push", "--run", str(run), "--to", PLACE]
    assert lorasmith([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "adapter_model.safetensors" in out
    assert "Nothing was sent" in out
    assert not hub.seen
    assert lorasmith(words) == 0
    assert f"Pushed to {hub.url}/{PLACE} (commit" in capsys.readouterr().out.replace("\n", "")
    assert lorasmith([*words, "--data", "--merged", "x"]) == 2


def test_login_takes_a_token_from_a_file_and_shows_it_nowhere(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    file = tmp_path / "token"
    file.write_text("hf_wrong\n")
    assert lorasmith(["login", "--token-file", str(file)]) == 1
    file.write_text(f"{WRITES}\n")
    assert lorasmith(["login", "--token-file", str(file)]) == 0
    assert (tmp_path / "HF_TOKEN_PATH").read_text() == WRITES
    said = "".join(capsys.readouterr())
    assert "Logged in to the Hub as anna" in said
    assert "not logged in to the Hub, or your token is no longer valid" in said
    assert WRITES not in said
    file.write_text("two words")
    assert lorasmith(["login", "--token-file", str(file)]) == 2


def lorasmith(words):
    """Run the command line with these words and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lorasmith", *words])
        try:
            main()
        except SystemExit as end:
            return end.code or 0
    return 0
