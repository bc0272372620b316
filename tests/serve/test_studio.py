"""The studio: by its functions, and by clicking through it in headless Chromium."""

import asyncio
import json
import re
import shutil
import time
import zipfile
from types import SimpleNamespace
from typing import get_args

import pytest

pytest.importorskip("gradio", reason="the extra studio is not installed")

from lorasmith.cli.run_file import RunFile, load_run_file
from lorasmith.errors import DataError, LorasmithError, RunError, SettingsError
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.model.method_settings import METHODS, RsLoraSettings
from lorasmith.serve.keys import Keys
from lorasmith.serve.models import open_models
from lorasmith.serve.service import Service
from lorasmith.serve.settings import ServeSettings
from lorasmith.serve.studio import jobs, train
from lorasmith.serve.studio.chat import build_chat
from lorasmith.serve.studio.data import examine
from lorasmith.serve.studio.form import fields_of, make_input, read_form
from lorasmith.serve.studio.page import mount_studio
from lorasmith.serve.studio.pieces import table
from lorasmith.serve.studio.places import Places
from lorasmith.serve.studio.progress import list_names, read_progress
from lorasmith.serve.studio.runs import (
    draw_curves,
    hand_out,
    list_exported,
    pack_adapter,
    show_report,
    show_work,
)
from serve.conftest import serving

pytestmark = pytest.mark.filterwarnings(
    "ignore::pandas.errors.Pandas4Warning"
)  # Gradio counts its events with pandas
KEY = "0123456789abcdef-key"
ROWS = [{"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(24)]


def read_settings(words):
    return load_run_file(None, words, {})


@pytest.fixture
def places(tmp_path, trained_run):
    """A runs folder with one finished run, and an uploads folder with one file."""
    shutil.copytree(trained_run, tmp_path / "runs" / "faq")
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    places = Places(tmp_path / "runs", tmp_path / "uploads")
    yield places
    for name in list_names(places):  # a test that failed half way leaves nothing at work
        for kind in get_args(jobs.Kind):
            if process := jobs.find(places.run(name), kind):
                process.kill()


@pytest.mark.parametrize("name", ["", ".", "..", "../faq", "/etc", "faq/../../uploads", "link"])
def test_names_that_point_elsewhere_are_refused(places, name):
    (places.runs / "link").symlink_to("/etc")
    (places.uploads / "link").symlink_to("/etc/hostname")
    with pytest.raises(RunError, match="no name of a run"):
        places.run(name)
    with pytest.raises(DataError, match="no uploaded file"):
        places.upload(name)


def test_an_upload_is_kept_under_a_plain_name_and_other_content_beside_it(places, tmp_path):
    file = tmp_path / "My data (1).JSONL"
    file.write_text("{}")
    assert [places.keep_upload(file), places.keep_upload(file)] == ["My-data-1.jsonl"] * 2
    file.write_text("[]")
    assert places.keep_upload(file) == "My-data-1-2.jsonl"
    assert places.list_uploads()[0] == "My-data-1-2.jsonl"
    (tmp_path / "run.sh").write_text("")
    with pytest.raises(DataError, match="no data file"):
        places.keep_upload(tmp_path / "run.sh")


def test_every_setting_has_an_input_whose_default_says_nothing():
    fields = fields_of(RunFile)
    values = {name: make_input(name, field).value for name, field in fields.items() if name != "data.train"}
    assert read_form(fields, values) == []
    for method in METHODS:
        words = read_form(fields, {**values, "method.name": method})
        assert words == ([] if method == "lora" else [f"method.name={method}"])
    assert {"run.root", "base.trust_remote_code", "run.trackers"} <= train._NOT_OFFERED <= set(fields)


def test_a_filled_form_reads_as_a_run_file_does():
    values = {
        "training.epochs": 5,
        "training.max_steps": "7",
        "training.learning_rate": "1e-4",
        "engine.compile": "false",
        "method.name": "lora",
        "method.lora.use_rslora": True,
        "method.lora.target_modules": "q_proj\nv_proj",
        "method.lora.layers_to_transform": "0\n1",
        "method.vera.r": 17,
        "run.sample_questions": "What: is it?\n\n",
        "prompt.system": "",
        "data.train": "faq.json",
    }
    settings = read_settings(read_form(fields_of(RunFile), values))
    assert (settings.training.epochs, settings.training.max_steps) == (5, 7)
    assert settings.training.learning_rate == 1e-4
    assert settings.engine.compile is False
    assert settings.method.use_rslora
    assert settings.method.target_modules == ("q_proj", "v_proj")
    assert settings.method.layers_to_transform == (0, 1)
    assert settings.run.sample_questions == ("What: is it?",)
    assert settings.prompt.system is None


def test_what_the_page_does_not_offer_is_not_trained(places, tiny_base_folder):
    fields = fields_of(RunFile)
    bases = [str(tiny_base_folder)]

    def start(**changes):
        values = {"run.name": "mine", "data.train": "sums.jsonl", "base.model": bases[0]}
        values |= {"data.validation": None, "report.data": []} | changes
        train.start_run(places, bases, fields, values, read_settings)

    with pytest.raises(DataError, match="no uploaded file"):
        start(**{"data.train": "../runs/faq/run.json"})
    with pytest.raises(SettingsError, match=r"base.model is '/etc'; the studio offers"):
        start(**{"base.model": "/etc"})
    with pytest.raises(SettingsError, match=r"prompt.recipe is '/etc/x.jinja'"):
        start(**{"prompt.recipe": "/etc/x.jinja"})
    with pytest.raises(RunError, match="has no name"):
        start(**{"run.name": ""})
    with pytest.raises(RunError, match="There is a run faq already"):
        start(**{"run.name": "faq"})
    with pytest.raises(SettingsError, match=r"run.name"):
        start(**{"run.name": "../out"})
    assert not (places.runs / "mine").exists()


def test_what_comes_from_files_is_shown_as_text(places, tiny_base_folder):
    assert "<script>" not in table(("a",), [("<script>",)])
    (places.uploads / "bad.jsonl").write_text(
        '{"instruction": "<script>x</script>", "output": "y"}\n{"instruction": "<b>",\n'
    )
    words = [f"data.train={places.upload('bad.jsonl')}", f"base.model={tiny_base_folder}"]
    shown = examine(read_settings([*words, "data.on_bad_row=skip"]), [str(tiny_base_folder)], 1)
    assert "&lt;script&gt;x&lt;/script&gt;" in shown
    assert "<script" not in shown
    assert re.search(r"<mark>y.*im_end.*</mark>", shown, re.DOTALL)
    assert "bad.jsonl:2" in shown
    assert "Training would stop" in examine(read_settings(words), [str(tiny_base_folder)], 1)


def test_the_zip_holds_the_adapter_and_its_record(places, tmp_path):
    file = pack_adapter(places, "faq", tmp_path)
    names = set(zipfile.ZipFile(file).namelist())
    assert {
        "faq/run.json",
        "faq/adapter/adapter_model.safetensors",
        "faq/adapter/adapter_config.json",
    } <= names
    assert "faq/metrics.jsonl" not in names
    shutil.rmtree(places.runs / "faq" / "adapter")
    with pytest.raises(LorasmithError, match="no adapter yet"):
        pack_adapter(places, "faq", tmp_path)


def test_progress_comes_from_the_folder(places):
    progress = read_progress(places, "faq")
    assert progress.state == "finished"
    assert progress.metrics[-1]["step"] == progress.metrics[-1]["num_steps"]
    assert progress.seconds_left == 0
    begun = places.runs / "begun"
    begun.mkdir()
    (begun / "train.process.json").write_text('{"pid": 1, "started": 0, "words": []}')  # not that process 1
    (begun / "train.log").write_text("Error: no room\n")
    assert read_progress(places, "begun").state == "failed"
    assert "no room" in train.show(read_progress(places, "begun"))
    assert list_names(places) == ["begun", "faq"]
    with pytest.raises(RunError, match="no process of the studio"):
        jobs.stop(begun, "train")
    with pytest.raises(RunError, match="at most 6"):
        draw_curves(places, ["faq"] * 7)


def test_a_run_that_failed_after_a_checkpoint_says_why(places):
    shutil.copytree(places.runs / "faq", places.runs / "struck")
    record = json.loads((places.runs / "struck" / "run.json").read_text())
    (places.runs / "struck" / "run.json").write_text(json.dumps({**record, "result": None}))
    (places.runs / "struck" / "checkpoints" / "step-3").mkdir(parents=True)
    (places.runs / "struck" / "train.log").write_text("Error: no room on the disk\n")
    progress = read_progress(places, "struck")
    assert progress.state == "stopped"
    assert "no room on the disk" in train.show(progress)


def test_a_job_that_failed_says_so_and_why(places):
    (places.run("faq") / "merge.log").write_text("Merging ...\nMerged model: here\n")
    (places.run("faq") / "export.log").write_text("Error: no room on\nthe disk\n")
    shown = show_work(places, "faq")
    assert "Merge: done" in shown
    assert "Export: failed" in shown
    assert "no room on\nthe disk" in shown


def test_exported_files_are_handed_out_without_a_copy(places, tmp_path):
    assert list_exported(places, "faq") == []
    folder = places.runs / "faq" / "exported"
    folder.mkdir()
    for name in ("faq-f16.gguf", "Modelfile", "lorasmith_export.json"):
        (folder / name).write_text(name)
    files = list_exported(places, "faq")
    handed = hand_out(files, tmp_path / "cache")
    assert [file.name for file in handed] == ["Modelfile", "faq-f16.gguf"]
    assert all(file.samefile(other) for file, other in zip(files, handed, strict=True))
    assert hand_out(files, tmp_path / "cache") == handed
    (folder / "Modelfile").unlink()  # written anew by the next export: another file
    (folder / "Modelfile").write_text("other")
    assert hand_out(files[:1], tmp_path / "cache")[0].read_text() == "other"


def test_the_report_is_framed_without_rights(places):
    assert "no report yet" in show_report(places, "faq")
    (places.runs / "faq" / "report.html").write_text('<p class="x">&amp;</p>')
    shown = show_report(places, "faq")
    assert 'sandbox="allow-scripts"' in shown
    assert "&lt;p class=&#34;x&#34;&gt;&amp;amp;&lt;/p&gt;" in shown


@pytest.fixture
def service(tiny_base_folder, places):
    models = open_models(
        [("faq", places.runs / "faq")],
        base=str(tiny_base_folder),
        base_name="tiny",
        device="cpu",
        dtype="float32",
    )
    return Service(models, ServeSettings())


def mounting(service, places, keys=None):
    def mount(app):
        bases = [service.models.base.root]
        mount_studio(
            app, places, service, bases=bases, run_file=RunFile, read_settings=read_settings, keys=keys
        )

    return mount


def test_the_api_stays_as_it_is_beside_the_page(service, places):
    import httpx2

    with serving(service, mount_page=mounting(service, places)) as url, httpx2.Client(base_url=url) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/metrics").status_code == 200
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["faq", "tiny"]
        unknown = client.get("/v1/nothing")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
        assert client.get("/v1/chat/completions").status_code == 405
        assert "content-security-policy" not in client.get("/health").headers
        assert client.get("/").headers["location"] == "/studio/"
        page = client.get("/studio/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        foreign = client.post(
            "/studio/gradio_api/queue/join", headers={"Origin": "http://example.org"}, json={}
        )
        assert foreign.status_code == 403


def test_keys_guard_the_page_too(service, places):
    import httpx2

    keys = Keys([KEY])
    options = {"keys": keys, "mount_page": mounting(service, places, keys)}
    with serving(service, **options) as url, httpx2.Client(base_url=url) as client:
        assert client.get("/studio/config").status_code == 401
        wrong = client.post("/studio/login", data={"username": "me", "password": "x" * 20})
        assert wrong.status_code == 400
        assert client.post("/studio/login", data={"username": "me", "password": KEY}).status_code == 200
        assert client.get("/studio/config").status_code == 200


def test_without_keys_the_page_is_for_this_machine_only(service, places):
    from fastapi import FastAPI

    service.settings = ServeSettings(host="0.0.0.0")
    with pytest.raises(SettingsError, match="which starts processes on this one"):
        mounting(service, places)(FastAPI())
    service.close()


def test_a_model_that_is_left_out_of_a_question_keeps_its_conversation(service):
    import gradio

    how = {**SamplingSettings().model_dump(), "max_tokens": 12, "stop": "", "seed": ""}
    request = SimpleNamespace(session_hash="one page")

    async def ask(answer, question, chosen, talks):
        steps = [step async for step in answer(request, question, chosen, talks, *how.values())]
        return steps[-1]

    async def ask_three_times():
        with gradio.Blocks() as page:
            build_chat(service)
        answer = next(event.fn for event in page.fns.values() if event.name == "answer")
        *_, talks = await ask(answer, "Who?", ["tiny", "faq"], {})
        *_, talks = await ask(answer, "Why?", ["tiny"], talks)
        return await ask(answer, "When?", ["tiny", "faq"], talks)

    _, shown, talks = asyncio.run(ask_three_times())
    service.close()
    asked = {name: [turn.content for turn in talk if turn.role == "user"] for name, talk in talks.items()}
    assert asked == {"tiny": ["Who?", "Why?", "When?"], "faq": ["Who?", "When?"]}
    assert shown.count("Who?") == 2


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=30_000)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open the studio at phone width; every request that it makes is noted and must stay on the server."""
    opened = []

    def open_at(url):
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(30_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.get_by_role("tab", name="Chat").wait_for()
        opened.append((page, url, asked))
        return page

    yield open_at
    for page, url, asked in opened:
        assert asked
        assert {
            address for address in asked if not address.startswith((url, "data:", "blob:", "about:"))
        } == set()
        page.close()


def go_to(page, tab):
    page.get_by_role("tab", name=tab).press("Enter")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing is wider than the phone


def choose(field, option):
    """Choose from a list by keys alone: on a busy machine Enter can come before the list has what was typed.

    A field that is left without a choice is empty again, or has its earlier one.
    """
    from playwright.sync_api import expect

    for _ in range(5):
        field.fill(option)
        expect(field.page.get_by_role("option", name=option, exact=True)).to_be_visible()
        field.press("Enter")
        field.blur()
        field.page.wait_for_timeout(200)
        if field.input_value() == option:
            return
    pytest.fail(f"{option} could not be chosen in five attempts")


def press(page, button):
    page.get_by_role("button", name=button, exact=True).press("Enter")


def test_chat_and_data_by_clicks_and_keys(service, places, open_page, tmp_path):
    from playwright.sync_api import expect

    with serving(service, mount_page=mounting(service, places)) as url:
        page = open_page(url)
        expect(page.locator("#chat-models input:checked")).to_have_count(2)
        question = page.get_by_label("Question")
        question.fill("What is 3 plus 3?")
        question.press("Enter")  # by keyboard alone
        expect(page.locator("#chat-answers .talk")).to_have_count(2)
        answers = page.locator("#chat-answers .turn.assistant")
        expect(answers.nth(1)).to_have_text(re.compile(r"[^…]"))
        expect(question).to_have_value("")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#chat-answers")).not_to_contain_text("Error")
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("#chat-answers")).to_contain_text("Choose whom to ask")

        go_to(page, "Data")
        file = tmp_path / "numbers.jsonl"
        file.write_text("\n".join([*(json.dumps(row) for row in ROWS), '{"instruction": ']))
        page.locator("#data-drop input[type=file]").set_input_files(file)
        outcome = page.locator("#data-outcome")
        expect(outcome).to_contain_text("numbers.jsonl:25")
        expect(outcome).to_contain_text("Training would stop")
        expect(outcome.locator("mark")).to_have_text(re.compile(r"It is 0\..*im_end"))
        page.get_by_text("How it is read").click()
        page.get_by_label("Data on bad row").click()
        page.get_by_role("option", name="skip").click()
        expect(outcome).to_contain_text("Ready to train")
        page.get_by_label("Example").fill("4")
        expect(outcome.locator("mark")).to_have_text(re.compile(r"It is 6\..*im_end"))


def test_runs_by_keys(service, places, open_page):
    from playwright.sync_api import expect

    shutil.copytree(places.runs / "faq", places.runs / "second")
    with serving(service, mount_page=mounting(service, places)) as url:
        page = open_page(url)
        go_to(page, "Runs")
        expect(page.locator("#runs-table tbody tr")).to_have_count(2)
        for name in ("faq", "second"):
            page.locator("#runs-curves").get_by_label(name).press("Space")
        expect(page.locator("#runs-chart polyline")).to_have_count(2)
        choose(page.locator("#runs-run input"), "second")
        expect(page.locator("#runs-page")).to_contain_text("second has no report yet")
        press(page, "Ask it in Chat")
        expect(page.locator("#runs-said")).to_contain_text("second is served now")
        assert service.models.find("second") is not None
        press(page, "Adapter as a zip")
        with page.expect_download() as download:
            press(page, "Download second-adapter.zip")
        assert "second/run.json" in zipfile.ZipFile(download.value.path()).namelist()
        press(page, "Merge, with proof")
        page.get_by_role("button", name="Export for llama.cpp and Ollama").press("Enter")
        choose(page.locator("#runs-quant input"), "f32")
        press(page, "Export")
        expect(page.locator("#runs-work")).to_contain_text("Merge: done", timeout=90_000)
        assert (places.runs / "second" / "merged" / "merge_proof.json").is_file()
        expect(page.locator("#runs-work")).to_contain_text("Export: done", timeout=90_000)
        offered = page.locator("#runs-exported tr")
        expect(offered.filter(has_text="Modelfile")).to_have_count(1)
        with page.expect_download() as download:
            offered.filter(has_text="gguf").get_by_role("link").press("Enter")
        assert download.value.path().read_bytes()[:4] == b"GGUF"


def test_a_run_outlives_page_and_server(service, places, open_page, tiny_base_folder):
    from playwright.sync_api import expect

    run_dir = places.runs / "mine"
    with serving(service, mount_page=mounting(service, places)) as url:
        page = open_page(url)
        go_to(page, "Train")
        page.get_by_label("Run name").fill("mine")
        choose(page.get_by_label("Data train"), "sums.jsonl")
        page.get_by_label("Training epochs").fill("5000")
        page.get_by_role("button", name="Every other setting").press("Enter")
        page.get_by_role("button", name=re.compile(r"^\W*Method")).press("Enter")
        expect(page.locator("#method-lora-r")).to_be_visible()
        choose(page.locator("#method-name input"), "rslora")
        expect(page.locator("#method-rslora-r")).to_be_visible()
        expect(page.locator("#method-lora-r")).not_to_be_visible()
        page.locator("#method-rslora-r input").fill("3")
        page.get_by_label("Run sample questions").fill("What is 3 plus 3?")
        press(page, "Start training")
        expect(page.locator("#train-said")).to_contain_text("mine is started")
        expect(page.locator("#train-view")).to_contain_text("of 15,000", timeout=90_000)
        expect(page.locator("#train-view")).to_contain_text("time left")
        expect(page.locator("#train-view")).to_contain_text("What is 3 plus 3?")
        expect(page.locator("#train-view polyline")).to_have_count(2)
    assert load_run_file(run_dir / "run.yaml", environ={}).method == RsLoraSettings(r=3)
    process = jobs.find(run_dir, "train")
    assert process is not None  # the server is gone, the run is not
    again = Service(service.models, ServeSettings())
    with serving(again, mount_page=mounting(again, places)) as url:
        page = open_page(url)
        go_to(page, "Train")
        expect(page.locator("#train-view")).to_contain_text("mine: Training")
        press(page, "Stop after this step")
        expect(page.locator("#train-view")).to_contain_text("mine: Stopped", timeout=60_000)
        steps = read_progress(places, "mine").metrics[-1]["step"]
        press(page, "Go on")
        expect(page.locator("#train-said")).to_contain_text("mine goes on")
        resumed_by = time.monotonic() + 90
        while read_progress(places, "mine").metrics[-1]["step"] <= steps:
            assert time.monotonic() < resumed_by, jobs.read_log(run_dir, "train")
            time.sleep(0.2)
        assert "Going on from step" in jobs.read_log(run_dir, "train", num_lines=100)
        jobs.stop(run_dir, "train")
        while jobs.find(run_dir, "train") is not None:
            time.sleep(0.1)
