"""lm-eval's tasks on base and tuned; without lm-eval, the pip line."""

import importlib.util
import json
import sys

import pytest

from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import MissingExtraError, SettingsError
from lorasmith.evaluation import harness
from lorasmith.evaluation.harness import TaskScore, run_tasks
from lorasmith.generation.chat import Chat

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"
)

TASK = """\
task: office_facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{right}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def chat(tiny_llama, tiny_tokenizer):
    return Chat(tiny_llama, tiny_tokenizer, choose_recipe(PromptSettings(), tiny_tokenizer)[0])


@pytest.fixture
def task(tmp_path):
    rows = [{"question": f"{i}?", "choices": ["yes", "no"], "right": i % 2} for i in range(4)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "office.yaml"
    file.write_text(TASK.format(data=tmp_path / "facts.jsonl"))
    return file


def test_without_the_extra_the_pip_line_is_told(chat, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[lm-eval\]'"):
        run_tasks(chat, ["arc_easy"])


@needs_lm_eval
@pytest.mark.filterwarnings("default")  # lm-eval's and its own dependencies' notices to their developers
def test_a_task_of_ones_own_is_scored(chat, task):
    (score,) = run_tasks(chat, [str(task)])
    assert (score.task, score.metric) == ("office_facts", "acc")
    assert score.value in (0, 0.25, 0.5, 0.75, 1)


@needs_lm_eval
@pytest.mark.filterwarnings("default")
def test_an_unknown_task_is_refused(chat):
    with pytest.raises(SettingsError, match="lm-eval knows no task no_such_task"):
        run_tasks(chat, ["no_such_task"])


def test_a_task_file_needs_a_name(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset_path: json")
    with pytest.raises(SettingsError, match="names no task"):
        harness._task_name(tmp_path / "a.yaml")
    with pytest.raises(SettingsError, match="cannot be read"):
        harness._task_name(tmp_path / "b.yaml")


def test_scores_are_read_with_their_errors():
    results = {
        "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 1, "f1_stderr,none": "N/A"}
    }
    assert harness._read_scores(results) == [TaskScore("t", "acc", 0.5, 0.1), TaskScore("t", "f1", 1.0, None)]
