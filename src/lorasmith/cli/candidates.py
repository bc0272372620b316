"""The runs that a comparison is made of: run files times methods, alike in data, split, seed and token budget.

The section ``method`` of a run file and its learning rate were chosen for the method that it names. Any other
method gets its own defaults and ``training.learning_rate: auto``; what is said on the command line holds for all.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorasmith.cli.run_file import RunFile, load_run_file, make_run_name, parse_setting
from lorasmith.errors import SettingsError
from lorasmith.model.method_settings import METHODS

if TYPE_CHECKING:
    from lorasmith.data.dataset import TokenizedDataset

# What must be the same for numbers to be comparable. The budget is looked at apart: steps may differ in size.
_ALIKE = (
    *(("base", "model"), ("base", "revision"), ("data", None), ("prompt", None), ("report", None)),
    *(("training", "seed"), ("training", "validation_share")),
)


@dataclass(frozen=True)
class Candidate:
    """One run of a comparison; its name is that of its folder too."""

    name: str
    run_file: RunFile


def read_methods(text: str) -> list[str]:
    """Return the methods that a list with commas names; "all" stands for every one.

    Raises:
        SettingsError: there is no such method.
    """
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if names == ["all"]:
        return list(METHODS)
    if "all" in names:
        raise SettingsError(
            f"--methods names all and {', '.join(name for name in names if name != 'all')}: all is every method by "
            "itself. Give --methods all, or a list of methods without it."
        )
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        near = difflib.get_close_matches(unknown[0], METHODS, n=1) if unknown else []
        hint = (
            f"Did you mean {near[0]}?" if near else f"The methods are {', '.join(METHODS)}; all: every one."
        )
        raise SettingsError(f"--methods names {', '.join(unknown) or 'no method'}. {hint}")
    return names


def make_candidates(words: Sequence[str], methods: Sequence[str]) -> list[Candidate]:
    """Return a candidate for each run file among ``words`` and each method; settings follow the files.

    Raises:
        SettingsError: a setting is wrong, or the candidates would not be comparable; says in what.
    """
    paths = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    if methods and (named := [word for word in settings if word.startswith("method.name=")]):
        raise SettingsError(
            f"--methods and {named[-1]} were given, and both name methods. Leave {named[-1]} out, or --methods."
        )
    of_method = [
        word for word in settings if word.startswith("method.") and not word.startswith("method.name=")
    ]
    rest = [word for word in settings if word not in of_method]
    stems = [make_run_name(Path(path).stem) or "run" for path in paths]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise SettingsError(
            f"Two run files are called {twice[0]}; their names are the names in the table. Rename one."
        )
    keeps_rate = any(word.startswith("training.learning_rate=") for word in rest)
    candidates = []
    for path, stem in zip(paths or [None], stems or [""], strict=True):
        run_file = load_run_file(path, rest if methods else settings)
        if not methods:
            candidates.append(Candidate(stem, run_file))
        for method in methods:
            name = method if len(paths) < 2 else f"{stem}-{method}"
            candidates.append(
                Candidate(name, with_method(run_file, method, of_method, keeps_rate=keeps_rate))
            )
    _check_owners(of_method, candidates)
    _check_alike(candidates)
    return candidates


def with_method(run_file: RunFile, method: str, settings: Sequence[str], *, keeps_rate: bool) -> RunFile:
    """Return ``run_file`` with another method; of ``settings`` ("method.r=8") it takes those that are its own."""
    is_own = run_file.method.name == method
    values = run_file.model_dump(mode="json", exclude_unset=True).get("method", {}) if is_own else {}
    for word in settings:
        name, _, text = word.partition("=")
        key = name.partition(".")[2]
        if key in METHODS[method].model_fields:
            values[key] = parse_setting(name, text)
    changed = change(run_file, method={**values, "name": method})
    return changed if is_own or keeps_rate else change(changed, training={"learning_rate": "auto"})


def change(run_file: RunFile, **sections: dict[str, Any]) -> RunFile:
    """Return ``run_file`` with some settings of its sections changed; the section ``method`` is replaced whole.

    Raises:
        SettingsError: a value is wrong.
    """
    values = run_file.model_dump(mode="json", exclude_unset=True)
    for section, settings in sections.items():
        values[section] = settings if section == "method" else {**values.get(section, {}), **settings}
    try:
        return RunFile.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        place = [str(part) for part in fault["loc"]]
        raise SettingsError(f"{place[0]}.{place[-1]} is {fault['input']!r}: {fault['msg']}") from None


def with_budget(candidates: Sequence[Candidate], num_tokens: int) -> tuple[list[Candidate], float]:
    """Return the candidates trained on about ``num_tokens`` tokens each, and how many epochs that is.

    Tokens of the examples count, prompts included, as if no prefix were shared.
    """
    from lorasmith.data.tokens import num_rows

    first = candidates[0].run_file
    rows = _rows_to_train(first)
    of_an_epoch, num_steps = int(rows.lengths.sum()), first.training.steps_per_epoch(num_rows(rows))
    if num_tokens < of_an_epoch / num_steps / 2:  # one step would be taken all the same
        raise SettingsError(
            f"--tokens {num_tokens} is not even one step, which has about {of_an_epoch / num_steps:,.0f} tokens. "
            "Give a larger budget."
        )
    share = num_tokens / of_an_epoch
    epochs = round(share, 4) or float(f"{share:.2g}")
    budget = {"epochs": epochs, "max_steps": None}
    return [replace(c, run_file=change(c.run_file, training=budget)) for c in candidates], epochs


def num_steps_of(run_file: RunFile) -> int:
    """Return the steps of a whole run; reads its data."""
    from lorasmith.data.tokens import num_rows

    return run_file.training.num_steps(num_rows(_rows_to_train(run_file)))


def check_budgets(candidates: Sequence[Candidate]) -> None:
    """Raise SettingsError where run files train for different numbers of examples, and so of tokens."""
    budgets = {}
    for candidate in candidates:
        training = candidate.run_file.training
        most = training.max_steps and training.max_steps * training.batch_size
        told = f"{training.epochs:g} epochs" + (f", at most {most} examples" if most else "")
        budgets.setdefault(told, candidate.name)
    if len(budgets) > 1:
        told = "; ".join(f"{name}: {budget}" for budget, name in budgets.items())
        raise SettingsError(
            f"The runs differ in how much they train ({told}). Give all the same: --tokens N."
        )


def check_held_out_is_there(run_file: RunFile) -> None:
    """Raise SettingsError where nothing is held out to compare by: questions, also of runs on plain texts."""
    if run_file.objective.name == "text" and not run_file.report.data:
        raise SettingsError(
            "Methods are compared by the questions that they answer right, and plain texts hold none. Name questions "
            "with their answers: report.data=FILE. (What a run on texts has learnt of them, its own report says.)"
        )
    if not (run_file.report.data or run_file.data.validation or run_file.training.validation_share):
        raise SettingsError(
            "Nothing is held out, so no method can be called better than another. Name questions that are not trained "
            "on: report.data=FILE or data.validation=FILE; or hold out a share: training.validation_share=0.2."
        )


def _check_owners(settings: Sequence[str], candidates: Sequence[Candidate]) -> None:
    methods = list(dict.fromkeys(candidate.run_file.method.name for candidate in candidates))
    for word in settings:
        key = word.partition("=")[0].partition(".")[2]
        if not any(key in METHODS[method].model_fields for method in methods):
            raise SettingsError(
                f"method.{key} is a setting of none of the compared methods ({', '.join(methods)})."
            )


def _check_alike(candidates: Sequence[Candidate]) -> None:
    first = candidates[0]
    for candidate in candidates[1:]:
        for section, key in _ALIKE:
            ours, theirs = (_value(c.run_file, section, key) for c in (first, candidate))
            if ours != theirs:
                fields = [key] if key else [k for k in ours if ours[k] != theirs.get(k)]
                raise SettingsError(
                    f"{first.name} and {candidate.name} differ in {section}.{fields[0]}, so their numbers could not be "
                    f"compared. Set it alike, on the command line for all: {section}.{fields[0]}=VALUE."
                )
        ours, theirs = (c.run_file.objective for c in (first, candidate))
        if ours.kind != theirs.kind and first.run_file.training.validation_share:
            raise SettingsError(
                f"{first.name} ({ours.name}) and {candidate.name} ({theirs.name}) do not count the same as a row, a "
                "pair or an answer, so the same share of the rows may be other questions. Leave "
                "training.validation_share out, and name what is held out: data.validation=FILE."
            )


def _value(run_file: RunFile, section: str, key: str | None) -> Any:
    values: Mapping[str, Any] = getattr(run_file, section).model_dump(mode="json")
    return values if key is None else values[key]


def _rows_to_train(run_file: RunFile) -> "TokenizedDataset":
    from lorasmith.data.dataset import prepare_dataset
    from lorasmith.data.prompts import choose_recipe
    from lorasmith.model.base import load_tokenizer, resolve_base
    from lorasmith.training.schedule import split_dataset

    base = resolve_base(run_file.base, fetches_weights=False)
    tokenizer = load_tokenizer(base, trust_remote_code=run_file.base.trust_remote_code)
    kind = run_file.objective.kind
    recipe, _ = choose_recipe(run_file.prompt, tokenizer, kind)
    every = prepare_dataset(run_file.data, recipe, tokenizer, kind=kind)
    kept, _ = split_dataset(every, run_file.training)
    return every.rows(kept)
