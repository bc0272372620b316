"""What users and strangers might hand in: valid files, then bytes of them flipped, cut, doubled and replaced."""

import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

# What has broken readers elsewhere; put anywhere into a file.
NASTY = [
    *(
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\xf4\x90\x80\x80",
        b"\xc0\x80",
        b"\x1b[2J",
        b"\x7f",
    ),
    *(b"\r", b"\r\n", b"\n\n", b"\x85", b"\xe2\x80\xa8", b'"', b"'", b"\\", b"\\u", b"\\ud800", b"\\u0000"),
    *(
        b",",
        b":",
        b"{",
        b"}",
        b"[",
        b"]",
        b"{}",
        b"[]",
        b"},{",
        b"}\n{",
        b"#",
        b"---",
        b"...",
        b"%",
        b"@",
        b"`",
    ),
    *(
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"0x",
        b"1" * 5000,
        b"9" * 20,
        b"2001-13-99",
        b"1:1:1.5",
    ),
    *(b"[" * 200, b"[" * 400, b'{"a":' * 400, b"- " * 500, b"&a ", b"*a", b"<<: ", b"!!int ", b"? "),
    *(
        b"!!python/object/apply:os.system ['true']",
        b"!!bool x",
        b"!!timestamp x",
        b"!!binary =",
        b"~",
        b"~nobody",
    ),
    *(b'"instruction"', b'"output"', b'"messages"', b'"role"', b'"conversations"', b"x" * 5000, b"</s>"),
    *(
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"{% if %}",
        b"(" * 300,
        b"|",
        b"<|im_end|>",
        b"../",
        b"/dev/zero",
        b".inf",
    ),
]
WORDS = [
    "",
    "When is payday?",
    "On the 1st.",
    "x" * 3000,
    "é ü ạ 語 🙂",
    "a\u2028b",
    "\ud800",
    "\x1b[2J",
    "\0",
]

texts = st.sampled_from(WORDS) | st.text("ab \n\t,\"'{}é語\ud800\0", max_size=6)
scalars: st.SearchStrategy[Any] = (
    texts | st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.just([])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=3,
)


def _object(**keys: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


_role = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", None, 3])
_turns = st.lists(
    _object(role=_role, content=texts | anything) | _object(**{"from": _role, "value": texts}), max_size=4
)
rows = (
    st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts | anything})
    | st.fixed_dictionaries({"prompt": texts | _turns, "completion": texts | _turns})
    | st.fixed_dictionaries({"messages": _turns | anything})
    | st.fixed_dictionaries({"conversations": _turns | anything})
    | _object(instruction=anything, output=anything, chosen=texts, rejected=texts)
    | anything
)


# Values as they stand in a file: most are refused by a parser, and the point is how.
RAW_JSON = [
    *(
        '"When?"',
        '"On the 1st."',
        '""',
        "null",
        "true",
        "0",
        "-",
        "1e999",
        "-0.0",
        "1" * 5000,
        "NaN",
        "-Infinity",
    ),
    *(
        "[" * 20_000,
        "[" * 500 + "]" * 500,
        '{"a":' * 2000,
        "[]",
        "{}",
        '[""]',
        '"\\ud800"',
        '"\\ud83d\\ude00"',
    ),
    *(
        '"\\u0000"',
        '"\\u001b[2J"',
        '"\t"',
        '"a" "b"',
        "'a'",
        "\\",
        '"',
        '"\x00"',
        "x" * 3000,
        '"' + "x" * 3000 + '"',
    ),
    *('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', '[{"role": {}}]', "[[]]"),
    *('[{"role": "user", "content": [{"type": "text", "text": 3}]}]', '{"a": {"a": {"a": []}}}', "[3, null]"),
]
_keys = st.sampled_from(
    ["instruction", "output", "input", "prompt", "completion", "messages", "conversations", "\\ud800"]
)
_raw_objects = st.lists(st.builds('"{}": {}'.format, _keys, st.sampled_from(RAW_JSON)), max_size=4).map(
    lambda members: "{" + ", ".join(members) + "}"
)


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(name, content) of a .json, .jsonl, .csv or .parquet file, mostly a little wrong."""
    suffix = draw(st.sampled_from(["json", "jsonl", "csv", "parquet"]))
    if suffix == "csv":
        cells = st.sampled_from(["instruction", "output", "prompt", "completion", '"a, ""b"""', ""]) | texts
        lines = draw(st.lists(st.lists(cells, max_size=4), max_size=5))
        head = draw(st.sampled_from(["instruction,output\n", "prompt,completion,x\n", ""]))
        content = (head + "\n".join(",".join(line) for line in lines)).encode("utf-8", "surrogatepass")
    elif suffix == "parquet":
        content = draw(st.sampled_from(PARQUET_FILES))
    elif draw(st.booleans()):
        table = draw(st.lists(_raw_objects | st.sampled_from(RAW_JSON), max_size=5))
        text = "\n".join(table) if suffix == "jsonl" else "[" + ",\n".join(table) + "]"
        content = text.encode("utf-8", "surrogatepass")
    else:
        table = draw(st.lists(rows, max_size=5))
        text = (
            "\n".join(map(json.dumps, table))
            if suffix == "jsonl"
            else json.dumps(table, ensure_ascii=False, indent=1)
        )
        content = text.encode("utf-8", "surrogatepass")
    return f"rows.{suffix}", draw(mutations(content))


def _parquet_files() -> list[bytes]:
    tables = [
        pyarrow.table({"instruction": ["When?", None], "output": ["Now.", "x"]}),
        pyarrow.table(
            {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
        ),
        pyarrow.table({"prompt": pyarrow.array([b"\xff"], pyarrow.binary()), "completion": ["x"]}),
        pyarrow.table({"instruction": pyarrow.array([2**62], pyarrow.timestamp("us")), "output": ["x"]}),
        pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["output", "output"]),
        pyarrow.table(
            {"instruction": pyarrow.array([[("k", 1)]], pyarrow.map_("string", "int64")), "output": ["x"]}
        ),
        pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())}),
    ]
    files = []
    for table in tables:
        for compression in ("none", "snappy"):
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(table, buffer, compression=compression)
            files.append(buffer.getvalue())
    return files


PARQUET_FILES = _parquet_files()


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """``content``, or with up to five places harmed, or in another encoding."""
    kinds = ["flip", "insert", "insert", "cut", "double", "end"]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=5)):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 30)))
        if kind == "flip" and start < len(content):
            flipped = content[start] ^ (1 << draw(st.integers(0, 7)))
            content = content[:start] + bytes([flipped]) + content[start + 1 :]
        elif kind == "insert":
            content = content[:start] + draw(st.sampled_from(NASTY)) + content[start:]
        elif kind == "cut":
            content = content[:start] + content[end:]
        elif kind == "double":
            content = content[:end] + content[start:]
        elif kind == "end":
            content = content[:start]
    encoding = draw(st.sampled_from(["utf-8"] * 9 + ["utf-16", "utf-32-le", "latin-1"]))
    if encoding != "utf-8":
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    return content


_RUN_FILE = b"""\
base: {model: 'smollm2-135m', dtype: float32}
data:
  train: faq.json  # a comment
  overlong: drop
prompt: {recipe: chat, system: "You are helpful.", stop: ["###"]}
method: {r: 8, lora_alpha: 16.0, target_modules: [q_proj, v_proj]}
training: {epochs: 3, learning_rate: 1e-4, batch_size: 8}
run: {name: faq, trackers: [tensorboard]}
"""
# Values and keys as YAML writes them.
RAW_YAML = [
    *(
        "faq.json",
        "3",
        "1e-4",
        "null",
        "~",
        "true",
        "2001-13-99",
        "2001-01-01 99:99:99",
        ".inf",
        "-.nan",
        "1" * 5000,
    ),
    *(
        "0b_",
        "0x",
        "0o9",
        "1_",
        "1:99.5",
        "1:59" * 400,
        "1" + ":59" * 300 + ".5",
        "[a]",
        "[[a]]",
        "{a: b}",
        "{[1]: 2}",
    ),
    *(
        "[" * 400,
        "[" * 300 + "]" * 300,
        "&a [1]",
        "*a",
        "{<<: 1}",
        "{<<: [{a: 1}, 2]}",
        "!!timestamp x",
        "!!bool x",
    ),
    *(
        "!!int x",
        "!!float x",
        "!!binary =",
        "!!set [a]",
        "!!omap [a]",
        "!!pairs [[a]]",
        "!!python/tuple [1]",
        "!x y",
    ),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x1b[2J"',
        "x" * 5000,
        "a/" * 3000,
        "~nobody/x",
        "'",
        '"',
        "|",
        ">-",
        "? a",
        "- a",
        "@",
        "%",
    ),
    *("{r: 1, r: 2}", "[3, 4.0, null, {}]", "10000000000000000000000", "-1", "auto", "/dev/zero", "..", "''"),
]
_YAML_KEYS = """
data.train base.model prompt.recipe prompt.stop prompt.system method.r method.lora_alpha method.target_modules
method.layers_to_transform training.epochs training.learning_rate training.warmup_steps run.name run.trackers
run.root engine.threads data.max_seq_len data.x 3.3 null.null [1].x data.[1] data.{a:b} data.null x.y
"""
_yaml_keys = st.sampled_from(_YAML_KEYS.split())
_settings = st.lists(st.tuples(_yaml_keys, st.sampled_from(RAW_YAML)), max_size=3).map(
    lambda pairs: "".join(
        f"{name.partition('.')[0]}:\n  {name.partition('.')[2]}: {value}\n" for name, value in pairs
    ).encode("utf-8", "surrogatepass")
)
_sections = st.lists(
    st.builds("{}: {}\n".format, st.sampled_from(["data", "run", "x", "method"]), st.sampled_from(RAW_YAML))
)
run_files = (
    mutations(_RUN_FILE)
    | _settings
    | _settings.flatmap(mutations)
    | _sections.map(lambda lines: "".join(lines).encode())
    | st.sampled_from(RAW_YAML).map(str.encode)
)

_names = st.sampled_from(
    [
        "training.epochs",
        "data.train",
        "run.name",
        "prompt.stop",
        "method.r",
        "base.model",
        "a.b",
        "a",
        "data.",
        "",
    ]
)
_values = texts | st.sampled_from([*RAW_YAML, *(bad.decode("utf-8", "surrogateescape") for bad in NASTY)])
overrides = st.lists(st.builds("{}={}".format, _names, _values) | texts, max_size=4)

_TEMPLATE = (
    b"{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    b"{% if add_generation_prompt %}{{ instruction.upper() }} {{ input }} {{ 3 * (1 + 2) }}{% endif %}"
)
_EXPRESSIONS = r"""
messages messages[0].content messages[9] messages.x.y instruction input system bos_token eos_token 1/0 1%0 1.x
9**9**2 'a'*9**7 [1]*9**5 range(9**9) range(10**6) 2.0**9999 messages|length messages|tojson input|int messages|sum
messages|first|upper instruction|format(1) '%d'|format('x') ''|first namespace(a=1).a cycler() joiner()() cycler(1)
raise_exception('no') raise_exception() strftime_now('%Y') strftime_now() instruction.encode('ascii')
'é'.encode('ascii')
''.__class__ self.__init__ lipsum() undefined.x undefined() messages() messages|nosuch
1is(nosuch) messages|map('x')
{}[[]] {'a':1}[{}] ''|center(9**7) instruction|truncate(-1) instruction|indent('x') input|round(3,'x') '\ud800'
[3,'a']|sort {}|sort(attribute=3) [1,2]|batch(0)|list 'a'|xmlattr {}|xmlattr 'a'|int(base=99) 'a'|replace(1,2)
''|wordwrap(0)
"""
_expressions = st.sampled_from(_EXPRESSIONS.split())
_tags = st.sampled_from(
    [
        *(
            "{% for m in messages %}",
            "{% endfor %}",
            "{% if add_generation_prompt %}",
            "{% else %}",
            "{% endif %}",
        ),
        *(
            "{% set x = x + 1 %}",
            "{% macro f(a) %}",
            "{% endmacro %}",
            "{{ f(f) }}",
            "{% generation %}",
            "{% break %}",
        ),
        *(
            "{% endgeneration %}",
            "{% include 'x' %}",
            "{% import 'os' as o %}",
            "{% extends x %}",
            "{% block b %}",
        ),
        *(
            "{% endblock %}",
            "{{ super() }}",
            "{% set true = 1 %}",
            "{% set ns.a = 1 %}",
            "{% raw %}",
            "{#",
            "{{ m.content }}",
        ),
        *(
            "{% macro g() %}{{ g() }}{% endmacro %}{{ g() }}",
            "{% filter upper %}",
            "{% with a=1 %}",
            "{% call f() %}",
        ),
        *(
            "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
            "{{ caller() }}",
            "{{ loop.index }}",
        ),
        *("{{ " + "(" * 300, "{% if 1 %}" * 30, "{{ " + "1" * 5000 + " }}", "{{ [" * 200, "<|im_end|>", "\n"),
    ]
)
_written = st.lists(_tags | _expressions.map("{{{{ {} }}}}".format), max_size=5).map(
    lambda parts: _TEMPLATE + "".join(parts).encode()
)
templates = mutations(_TEMPLATE) | _written | _written.flatmap(mutations)

adapter_values = anything | st.sampled_from(
    [10**9, -1, 1.5, "LORA", "IA3", ["q_proj"], {"q_proj": 10**9}, [[0, 9**9]]]
)
_SETTINGS_OF_LORA = (
    "r lora_alpha peft_type task_type target_modules rank_pattern alpha_pattern auto_mapping modules_to_save "
    "layer_replication megatron_config base_model_name_or_path use_dora bias layers_to_transform "
    "init_lora_weights exclude_modules runtime_config trainable_token_indices lora_bias x"
)
adapter_changes = st.dictionaries(st.sampled_from(_SETTINGS_OF_LORA.split()), adapter_values, max_size=3)
