"""Run file < environment < flags -> RunFile: the only place that knows every section.

A run file is YAML with one mapping per section (``base``, ``data``, ``prompt``, ``method``, ``engine``,
``training``, ``objective``, ``run``, ``report``). ``LORASMITH_TRAINING__EPOCHS=2`` overrides it,
``training.epochs=2`` on the command line overrides both. All faults are reported together.
"""

import difflib
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.fields import FieldInfo

from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import SettingsError
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.files import write_whole
from lorasmith.model.method_settings import METHODS, LoraSettings, MethodSettings
from lorasmith.model.settings import BUILT_IN, BaseSettings
from lorasmith.training.settings import ObjectiveSettings, OutputSettings, TrainingSettings

if TYPE_CHECKING:
    from lorasmith.training.job import TrainingJob
    from lorasmith.training.loop import StepReport

ENVIRONMENT_PREFIX = "LORASMITH_"
_MAX_BYTES = 1 << 16  # PyYAML takes seconds for what is larger, and it is no run file


class RunFile(BaseModel):
    """Everything that a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: BaseSettings = BaseSettings()
    data: DataSettings
    prompt: PromptSettings = PromptSettings()
    method: MethodSettings = LoraSettings()
    engine: EngineSettings = EngineSettings()
    training: TrainingSettings = TrainingSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    run: OutputSettings = OutputSettings()
    report: ReportSettings = ReportSettings()

    @field_validator("method", mode="before")
    @classmethod
    def _name_lora(cls, section: Any) -> Any:
        """A section without a name is LoRA's: run files are older than the other methods."""
        return {"name": "lora", **section} if isinstance(section, dict) else section


def load_run_file(
    path: str | Path | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> RunFile:
    """Return the settings of the run file at ``path``, overridden by the environment and by ``section.key=value``.

    Paths in the file that exist relative to its folder are taken so; overrides are relative to the working folder.

    Raises:
        SettingsError: the file cannot be read, or any setting is unknown or has a wrong value; names them all.
    """
    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}  # section.key -> where its value comes from
    faults: list[str] = []
    if path is not None:
        _take_file(Path(path), values, sources, faults)
    for name, text in sorted((os.environ if environ is None else environ).items()):
        section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if name.startswith(ENVIRONMENT_PREFIX) and separator:
            _take(values, sources, f"{section}.{key}", parse_setting(f"{section}.{key}", text), name)
    _take_overrides(overrides, values, sources, faults)
    try:
        run_file = RunFile.model_validate(values)
    except ValidationError as error:
        method = values.get("method", {}).get("name", "lora")
        told = [_describe(fault, fault["loc"], sources, path, method) for fault in error.errors()]
        faults += _each_once(told)
        run_file = None
    if faults or run_file is None:
        raise _all_at_once(faults)
    return run_file


def override_report(recorded: Mapping[str, Any], overrides: Sequence[str]) -> ReportSettings:
    """Return the section ``report`` of a run's record, overridden by ``report.key=value``.

    Raises:
        SettingsError: a setting is unknown, of another section, or has a wrong value; names them all.
    """
    values: dict[str, dict[str, Any]] = {"report": dict(recorded)}
    sources: dict[str, str] = {}
    faults: list[str] = []
    _take_overrides(overrides, values, sources, faults)
    faults += [
        f"command line: {name} is fixed since the training; only report.key=value can be set here"
        for name in sources
        if not name.startswith("report.")
    ]
    settings = None
    try:
        settings = ReportSettings.model_validate(values["report"])
    except ValidationError as error:
        told = [_describe(fault, ("report", *fault["loc"]), sources, None, "") for fault in error.errors()]
        faults += _each_once(told)
    if faults or settings is None:
        raise _all_at_once(faults)
    return settings


def _each_once(faults: Sequence[str]) -> list[str]:
    """Return the faults with those of one value made one: it may be wrong for each kind that a setting takes."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        about, _, kind = fault.partition(_SHOULD_BE)
        kinds.setdefault(about, []).append(kind)
    told = []
    for about, found in kinds.items():
        whole = found[0] if len(found) == 1 else " or ".join(kind.partition(", unable")[0] for kind in found)
        told.append(f"{about}{_SHOULD_BE}{whole}" if whole else about)
    return told


def _all_at_once(faults: Sequence[str]) -> SettingsError:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return SettingsError(f"{count} in the settings:\n" + "\n".join(f"  - {fault}" for fault in faults))


def prepare(run_file: RunFile, run_dir: Path, **report_to: Any) -> "TrainingJob":
    """Return the job that ``run_file`` describes, ready for its first step; ``report_to`` as for prepare_job."""
    from lorasmith.training.job import prepare_job

    return prepare_job(run_dir, run_file, **report_to)


def train(run_file: RunFile, run_dir: str | Path) -> "Iterator[StepReport]":
    """Train into ``run_dir``, or go on with it, and yield a report after each step.

    Called in every process that torchrun starts, it trains with all of them; each yields the same reports.
    run.sample_questions are for the screen and not asked here: ask a ``Chat`` between two steps, or afterwards.

    Raises:
        LorasmithError: anything that a user can mend is wrong; its text says how.
    """
    from lorasmith.export.card import write_card
    from lorasmith.training.distributed import joined
    from lorasmith.training.job import hold_run, run_job

    with (
        joined(run_file.base.device, run_file.run.lost_after_seconds) as team,
        hold_run(Path(run_dir)) if team.is_first else nullcontext(),
    ):
        yield from run_job(prepare(run_file, Path(run_dir), team=team))
        if team.is_first:
            write_card(Path(run_dir))


def write_run_file(path: Path, run_file: RunFile, *, comment: str = "") -> None:
    """Write the settings that were set, with absolute paths: the file may lie anywhere, and is read as it was."""
    values = run_file.model_dump(mode="json", exclude_unset=True)
    for section, key in sorted(_PATHS):
        value = values.get(section, {}).get(key)
        if isinstance(value, list):
            values[section][key] = [_absolute(each) for each in value]
        elif value is not None:
            values[section][key] = _absolute(value)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    write_whole(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text as run files are read: 1e-4 is a number, and no key may stand twice.

    Raises:
        yaml.YAMLError: it is not YAML, or YAML that no run file needs: aliases, other tags than YAML's own.
    """
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(
            f"it has {len(text):,} characters, and {_MAX_BYTES:,} are enough for all settings"
        )
    try:
        return yaml.load(text, Loader=_RunFileLoader)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML's own slips: a 13th month, a number of 5,000 digits, a thousand brackets, a list as a key.
        raise yaml.YAMLError(f"a value in it cannot be read ({error})") from error


def make_run_name(text: str) -> str:
    """Return ``text`` as a run may be called: letters of English, digits, and . _ - inside; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")


def setting_names() -> dict[str, str]:
    """Return every section.key with its description, in the order of the run file."""
    return {
        f"{section}.{key}": field.description or ""
        for section in RunFile.model_fields
        for key, field in section_fields(section).items()
    }


def section_fields(section: str) -> dict[str, FieldInfo]:
    """Return the settings of a section; of ``method`` those of all methods, LoRA's where they share a name."""
    fields: dict[str, FieldInfo] = {}
    for kind in _section_kinds(section):
        fields |= {key: field for key, field in kind.model_fields.items() if key not in fields}
    if "name" in fields and section == "method":
        fields = {"name": fields.pop("name"), **fields}
    return fields


def _section_kinds(section: str) -> tuple[type[BaseModel], ...]:
    annotation: Any = RunFile.model_fields[section].annotation
    return tuple(METHODS.values()) if section == "method" else (annotation,)


def _take_file(
    path: Path, values: dict[str, dict[str, Any]], sources: dict[str, str], faults: list[str]
) -> None:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in Path(path.parent).glob("*.y*ml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else " Make one with: lorasmith init"
        raise SettingsError(f"There is no run file {path}.{hint}")
    if path.stat().st_size > _MAX_BYTES:
        raise SettingsError(
            f"{path} has {path.stat().st_size:,} bytes; a run file has at most {_MAX_BYTES:,}. Is it your data? "
            "Data is named inside a run file, or with --data FILE."
        )
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"{path} holds {'nothing' if content is None else type(content).__name__}; a run file is a mapping of "
            f"sections: {', '.join(RunFile.model_fields)}."
        )
    for section, settings in content.items():
        if section in RunFile.model_fields and isinstance(settings, dict):
            for key, value in settings.items():
                if (section, key) in _PATHS and not isinstance(value, list):
                    value = _relative_to(path.parent, value)
                elif (section, key) in _PATHS:
                    value = [_relative_to(path.parent, each) for each in value]
                _take(values, sources, f"{section}.{key}", value, str(path))
        elif section in RunFile.model_fields and settings is None:
            continue  # a section whose settings are all commented out
        elif section in RunFile.model_fields:
            first = next(name.partition(".")[2] for name in setting_names() if name.startswith(f"{section}."))
            faults.append(
                f"{path}: {section} is {_show(settings)}; it is a section and holds settings, such as {first}"
            )
        else:
            faults.append(f"{path}: {_describe_unknown(str(section), is_section=True)}")


_PATHS = {
    ("data", "train"),
    ("data", "validation"),
    ("base", "model"),
    ("prompt", "recipe"),
    ("report", "data"),
}
# These mean what they say, whatever files of that name there are.
_NAMES = {"auto", "alpaca", "chat", "text", BUILT_IN}


def _relative_to(folder: Path, value: Any) -> Any:
    """Return ``value`` as a path from the run file's folder if something is there, else as it is."""
    if not isinstance(value, str) or value in _NAMES or os.path.isabs(value):
        return value
    there = folder / value
    return os.path.normpath(there) if os.path.exists(there) else value  # Path.exists raises on a long name


def _absolute(value: str) -> str:
    """Return ``value`` as an absolute path if something is there, else as it is."""
    return value if value in _NAMES or not os.path.exists(value) else os.path.abspath(value)


def _take_overrides(
    overrides: Sequence[str], values: dict[str, dict[str, Any]], sources: dict[str, str], faults: list[str]
) -> None:
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or name.count(".") != 1:
            faults.append(f'"{override}" is not of the form section.key=value, for example training.epochs=3')
        else:
            _take(values, sources, name, parse_setting(name, text), "command line")


def _take(
    values: dict[str, dict[str, Any]], sources: dict[str, str], name: str, value: Any, source: str
) -> None:
    section, _, key = name.partition(".")
    values.setdefault(section, {})[key] = value
    sources[name] = source


def parse_setting(name: str, text: str) -> Any:
    """Return a value as YAML reads it: 3 is a number, true a truth value, [a, b] a list; a text stays as it is."""
    section, _, key = name.partition(".")
    field = section_fields(section).get(key) if section in RunFile.model_fields else None
    if field is not None and field.annotation in (str, str | None):
        return None if text == "null" and field.annotation is not str else text
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def _describe(
    fault: Any, loc: Sequence[Any], sources: Mapping[str, str], path: str | Path | None, method: Any
) -> str:
    """Return one pydantic fault, found at ``loc``, in the words of a run file."""
    place = [str(part) for part in loc]
    if place[0] == "method" and len(place) > 1:
        del place[1]  # pydantic's name of the method's class stands between section and key
    name = ".".join(place[:2])
    source = sources.get(name, str(path) if path is not None else "command line")
    if fault["type"] == "missing":
        way_out = "name your data: data.train=FILE, or --data FILE" if name.startswith("data") else "set it"
        return f"{name if '.' in name else name + '.train'} is missing; {way_out}"
    if fault["type"] == "union_tag_invalid":
        source = sources.get("method.name", source)
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the methods are {', '.join(METHODS)}"
        return f"{source}: method.name is {_show(method)}, and there is no such method; {hint}"
    if fault["type"] == "extra_forbidden":
        key = name.partition(".")[2]
        if name.startswith("method.") and (owners := _owners_of(key)):
            own = ", ".join(sorted(METHODS[method].model_fields.keys() - {"name"})) or "no settings at all"
            return f"{source}: {name} is no setting of {method}, which has {own}; it belongs to {', '.join(owners)}"
        return f"{source}: {_describe_unknown(name, is_section='.' not in name)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "tuple_type":
        value = "..." if isinstance(fault["input"], dict) else fault["input"]
        message = f"{_SHOULD_BE[2:]}a list, such as [{value}]"
    message = message[:1].lower() + message[1:]
    if name not in sources:  # a rule over several settings of a section
        return f"{name}: {message}"
    return f"{source}: {name} is {_show(fault['input'])}: {message}"


_SHOULD_BE = ": input should be "  # pydantic's words


def _owners_of(key: str) -> list[str]:
    """Return the methods that have the setting ``key``."""
    return [name for name, kind in METHODS.items() if key in kind.model_fields]


def _describe_unknown(name: str, *, is_section: bool) -> str:
    names = list(setting_names())
    section, _, key = name.partition(".")
    if is_section:
        owners = [known for known in names if known.endswith(f".{name}")]
        if owners:
            return f"{name} stands at the top; it belongs in a section: {owners[0]}"
        near = difflib.get_close_matches(name, list(RunFile.model_fields), n=1)
        hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(RunFile.model_fields)}"
        return f"there is no section {name}; {hint}"
    elsewhere = [known for known in names if known.endswith(f".{key}")]
    here = [known for known in names if known.startswith(f"{section}.")]
    keys = [known.partition(".")[2] for known in here]  # compared without the section, which is always alike
    near = elsewhere or [f"{section}.{found}" for found in difflib.get_close_matches(key, keys, n=1)]
    near = near or ([] if here else difflib.get_close_matches(name, names, n=1))
    hint = f"did you mean {near[0]}?" if near else f"{section} has {', '.join(keys)}"
    return f"there is no setting {name}; {hint}"


def _show(value: Any) -> str:
    """Return a value as an error text quotes it: not longer than a line or two, whatever it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 120, 120
    return short.repr(value)


class _RunFileLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but a key that stands twice is an error and 1e-4 is a number.

    Aliases are refused: nine lines of them can stand for a billion values.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line} has an alias (*name); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f'"{key}" stands twice, again in line {line}; keep one of them')
            seen.add(key)
        return super().construct_mapping(node, deep)


_RunFileLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
