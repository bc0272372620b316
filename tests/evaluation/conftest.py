"""A tiny run with a held-out share, trained once, for the tests of the report."""

import json

import pytest

from lorasmith.cli.run_file import load_run_file, train

NUM_ROWS = 24


@pytest.fixture(scope="session")
def training_rows():
    return [{"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(NUM_ROWS)]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, tiny_base_folder, training_rows):
    """A finished run; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "faq.json").write_text(json.dumps(training_rows))
    words = [
        f"base.model={tiny_base_folder}",
        f"data.train={folder / 'faq.json'}",
        "training.validation_share=0.25",
        "training.epochs=2",
        "base.device=cpu",
        "base.dtype=float32",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASMITH_CACHE", str(folder / "cache"))
        for _ in train(load_run_file(None, words, {}), folder / "runs" / "faq"):
            pass
    return folder / "runs" / "faq"
