"""``lorasmith estimate``: here by measurement, for a GPU by computing, also without any weights."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from lorasmith.cli import main
from lorasmith.errors import LorasmithError


@pytest.fixture
def lorasmith(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        monkeypatch.setattr("sys.argv", ["lorasmith", *words])
        result = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, list(words))
        if result.exception and not isinstance(result.exception, (LorasmithError, SystemExit)):
            raise result.exception
        return result

    return run


@pytest.fixture
def words(tmp_path, tiny_base_folder):
    rows = [{"instruction": f"What is number {i}?", "output": f"It is the {i * 7}th."} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return (f"base.model={tiny_base_folder}", "data.train=rows.json", "training.epochs=4")


def test_here_it_is_measured_and_nothing_is_left(lorasmith, words, tmp_path):
    result = lorasmith("estimate", *words)
    assert result.exit_code == 0, result.output
    for text in (
        "at the peak",
        "fits",
        "yes",
        "all 12 steps",
        "Peak and time: measured by ",
        "Disk:",
        "merged model",
    ):
        assert text in result.output, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json"]


@pytest.mark.parametrize(
    ("more", "told"),
    [("method.name=lora", ", shared prefixes counted once. "), ("method.lora_dropout=0.1", ". All of it")],
)
def test_shared_prefixes_are_named_where_they_are_shared(lorasmith, words, more, told):
    output = " ".join(lorasmith("estimate", *words, more, "--gpu", "L4").output.split())
    assert re.search(rf"Tokens of the run: \d[\d,]*{re.escape(told)}", output), output


def test_the_parts_are_the_peak_in_json_too(lorasmith, words):
    report = json.loads(lorasmith("estimate", *words, "--json").output)
    (here,) = report["estimates"]
    assert here["fits"]
    assert here["how"].startswith("measured")
    assert sum(here["parts"].values()) == here["peak_bytes"]
    assert here["seconds"][0] == pytest.approx(here["seconds_per_step"][0] * 12)
    # r=16 on q, k, v, o, gate, up, down of two layers of hidden size 32, keys of 16, middle size 64.
    assert report["disk"]["adapter"] == 4 * 2 * 16 * (64 + 48 + 48 + 64 + 96 + 96 + 96)
    assert report["free_disk_bytes"] > 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_merged_model_of_a_quantised_base_is_as_large_as_that_of_another(kind, lorasmith, words):
    pytest.importorskip("bitsandbytes")
    words = ("estimate", *words, "base.dtype=bfloat16", "--json")
    merged = [
        json.loads(lorasmith(*words, f"base.quantization={how}").output)["disk"] for how in ("none", kind)
    ]
    assert merged[0] == merged[1]


def test_for_a_gpu_it_is_computed_from_the_config_alone(lorasmith, words, tmp_path, tiny_base_folder):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    result = lorasmith("estimate", f"base.model={bare}", *words[1:], "--gpu", "T4", "--gpu", "a10g:2")
    assert result.exit_code == 0, result.output
    for text in ("T4", "2 x A10G", "15.00 GiB", "computed, not measured", "CUDA context (assumed)"):
        assert text in result.output, text
    assert "On T4, 2 x A10G the operations of a step are so small" in " ".join(result.output.split())


def test_products_that_take_longer_than_their_starts_are_given_as_a_span(lorasmith, words, monkeypatch):
    from lorasmith.model import gpus

    monkeypatch.setitem(gpus.GPUS, "Slow", gpus.Gpu("Slow", 16, 1e-4, 1e-4))
    report = json.loads(lorasmith("estimate", *words, "--gpu", "slow", "--json").output)
    (slow,) = report["estimates"]
    assert slow["seconds"][1] == pytest.approx(2 * slow["seconds"][0])
    assert not slow["is_bound_by_starts"]


@pytest.mark.parametrize(
    ("kind", "a_number", "a_row"), [("int8", 1, 4), ("nf4", 1 / 2 + 1 / 64 + 1 / 4096, 0)]
)
def test_for_a_gpu_a_quantised_base_takes_its_own_size(kind, a_number, a_row, lorasmith, words):
    """Two layers of 32 x (32 + 16 + 16 + 32 + 64 + 64) + 64 x 32 weights."""

    def weights(*more):
        report = json.loads(lorasmith("estimate", *words, "--gpu", "T4", "--json", *more).output)
        return report["estimates"][0]["parts"]["weights of base and adapter"]

    numbers, num_outputs = 2 * (32 * 224 + 64 * 32), 2 * 256
    saved = weights("base.dtype=float32") - weights(f"base.quantization={kind}")
    assert saved == pytest.approx(4 * numbers - numbers * a_number - num_outputs * a_row, abs=8)


def test_of_a_sharded_base_a_gpu_holds_its_part_and_two_gathered_layers(lorasmith, words):
    """All of both layers are the two gathered ones, so an eighth comes on top: 4 bytes for each weight and norm."""

    def estimate(*more):
        return json.loads(lorasmith("estimate", *words, "--gpu", "T4:8", "--json", *more).output)[
            "estimates"
        ][0]

    whole, sharded = estimate(), estimate("engine.shard_base=true")
    of_layers = 4 * 2 * (32 * 224 + 64 * 32 + 2 * 32)
    weights = "weights of base and adapter"
    assert sharded["parts"][weights] - whole["parts"][weights] == of_layers / 8
    assert (sharded["micro_batch_tokens"], sharded["gradient_checkpointing"]) == (16384, True)  # not measured
    assert (whole["is_sharded"], sharded["is_sharded"]) == (False, True)
    said = lorasmith("estimate", *words, "--gpu", "T4:8", "engine.shard_base=true").output
    assert "without the traffic of the sharded base, validation and saving" in " ".join(said.split())


@pytest.mark.parametrize("more", [(), ("--gpu", "Slow")])
def test_what_goes_through_without_gradient_is_in_the_time(more, lorasmith, words, tmp_path, monkeypatch):
    from lorasmith.model import gpus
    from lorasmith.training import preference

    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setitem(gpus.GPUS, "Slow", gpus.Gpu("Slow", 16, 1e-4, 1e-4))
    monkeypatch.setattr(preference, "write_arrays", None)  # no reference is computed for an estimate

    def estimate(objective):
        asked = ("estimate", words[0], "data.train=pairs.jsonl", f"objective.name={objective}", *more)
        shown, report = lorasmith(*asked), lorasmith(*asked, "--json")
        assert shown.exit_code == 0, shown.output
        return json.loads(report.output)["estimates"][0], " ".join(shown.output.split())

    (orpo, said), (dpo, _), (kto, said_of_kto) = map(estimate, ("orpo", "dpo", "kto"))
    assert orpo["num_asked"] == 0
    assert "without gradient" not in said
    assert dpo["num_asked"] == pytest.approx(dpo["num_tokens"] / 3, rel=0.01)  # once, of three epochs
    assert kto["num_asked"] == pytest.approx(kto["num_tokens"] * 7 / 3, rel=0.01)
    assert f"; {kto['num_asked']:,} more go through without gradient" in said_of_kto
    if more:
        assert dpo["seconds"][1] == pytest.approx(orpo["seconds"][1] * 7 / 6, rel=0.01)


def test_a_quantised_base_is_refused_where_training_would_refuse_it(lorasmith, words):
    result = lorasmith("estimate", *words, "--gpu", "T4", "base.quantization=int8", "method.name=full")
    assert "no gradient moves" in " ".join(str(result.exception).split())


def test_what_does_not_fit_is_told_by_the_exit_code(lorasmith, words, monkeypatch):
    from lorasmith.model import gpus

    monkeypatch.setitem(gpus.GPUS, "Tiny", gpus.Gpu("Tiny", 0.5, 1, 1))
    result = lorasmith("estimate", *words, "--gpu", "tiny")
    assert result.exit_code == 1
    assert "no" in result.output
    assert (
        json.loads(lorasmith("estimate", *words, "--gpu", "tiny", "--json").output)["estimates"][0]["seconds"]
        is None
    )


def test_a_wrong_gpu_is_refused_with_the_near_name(lorasmith, words):
    assert "Did you mean T4?" in str(lorasmith("estimate", *words, "--gpu", "T4x").exception)
