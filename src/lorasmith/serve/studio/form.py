"""Settings classes -> a form, and a filled form -> ``section.key=value`` words; no setting is written twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr
from annotated_types import Ge, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ReadSettings = Callable[[Sequence[str]], BaseModel]  # words -> the run file; SettingsError names every fault


def fields_of(run_file: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return every ``section.key`` of a run file's class with its field, in order.

    A section that one of several classes may fill has each one's own keys: method.name, method.lora.r, method.vera.r.
    """
    fields = {}
    for section, holder in run_file.model_fields.items():
        kinds: Any = get_args(holder.annotation) or (holder.annotation,)
        for kind in kinds:
            own, place = dict(kind.model_fields), section
            if len(kinds) > 1:  # told apart by their name
                fields.setdefault(f"{section}.name", own["name"])
                place = f"{section}.{own.pop('name').default}"
            fields |= {f"{place}.{key}": field for key, field in own.items()}
    return fields


def make_input(name: str, field: FieldInfo, *, choices: Sequence[str] = (), info: str = "") -> Any:
    """Return the input for a setting: its type decides the kind, its description is the help.

    ``choices`` are what may be chosen where the type alone allows any text; ``info`` is the help where the page
    takes less than a run file does.
    """
    about = {"label": _label(name), "info": info or field.description, "elem_id": _element_id(name)}
    kinds = _kinds(field.annotation)
    options = list(choices) or [option for kind in kinds for option in _options(kind)]
    if tuple in kinds:
        shown = "\n".join(_as_list(field.default))
        return gr.Textbox(shown, lines=2, placeholder="one a line", **about)
    if kinds == {bool}:
        return gr.Checkbox(bool(field.default), **about)
    if options and kinds <= {bool, str} | {kind for kind in kinds if _options(kind)}:
        first = None if field.is_required() else _shown(field.default)
        return gr.Dropdown(options, value=first if first in options else options[0], **about)
    if kinds in ({int}, {float}) and field.default is not None:
        bounds = {}
        for bound in field.metadata:
            bounds |= {"minimum": bound.ge} if isinstance(bound, Ge) else {}
            bounds |= {"maximum": bound.le} if isinstance(bound, Le) else {}
        step = {"precision": 0} if kinds == {int} else {"step": 0.1}
        return gr.Number(field.default, **bounds, **step, **about)
    shown = "" if field.is_required() or field.default is None else _shown(field.default)
    return gr.Textbox(shown, placeholder="" if info else "none", lines=1, **about)


def make_choice(name: str, field: FieldInfo, *, info: str) -> gr.Dropdown:
    """Return the input for a setting that names files: one of a list that is filled later, or several."""
    several = tuple in _kinds(field.annotation)
    return gr.Dropdown([], label=_label(name), info=info, elem_id=_element_id(name), multiselect=several)


def read_form(fields: Mapping[str, FieldInfo], values: Mapping[str, Any]) -> list[str]:
    """Return the words for every value of the form that is not its setting's default.

    What belongs to a class that was not chosen, such as method.vera.r beside method.name=lora, is left out.
    """
    words = []
    for path, value in values.items():
        field = fields[path]
        section, *kind, key = path.split(".")
        if kind and kind != [values[f"{section}.name"]]:
            continue
        name = f"{section}.{key}"
        if tuple in _kinds(field.annotation):
            value = [line.strip() for line in str(value or "").split("\n") if line.strip()]
            if value != _as_list(field.default):
                words.append(f"{name}={json.dumps(value, ensure_ascii=False)}")
        elif value not in (None, "") and (field.is_required() or _shown(value) != _shown(field.default)):
            words.append(f"{name}={_shown(value)}")
    return words


def _as_list(default: Any) -> list[str]:
    return [default] if isinstance(default, str) else [str(each) for each in default or ()]


def _label(name: str) -> str:
    words = name.split(".")
    del words[1:-1]  # whose key it is; the others are not shown then
    return " ".join(words).replace("_", " ").capitalize()


def _element_id(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types of an annotation: None, bounds and the like taken off, Literals as they are."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    if annotation is type(None):
        return set()
    if origin is tuple:
        return {tuple}
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kinds(get_args(annotation)[0])
    return {annotation}


def _options(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(option) for option in get_args(kind)]
    return ["true", "false"] if kind is bool else []
