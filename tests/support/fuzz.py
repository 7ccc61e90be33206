"""Malformed inputs for the commands: files, options and folders with random changes.

A valid input is an argument list and a folder with models, data, and the files of an interrupted
run. A mutation changes one thing, and returns the expected outcome. REFUSED is a message and a
status other than 0. SAME is status 0 and the result of the valid input. EITHER is REFUSED or SAME.
CLEAN is a message or any result, because the changed input may be valid but mean something else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REFUSED, SAME, EITHER, CLEAN = "refused", "same", "either", "clean"

ODD_VALUES: list[Any] = [None, True, "", "x", [], {}, -1, 0, 10**30, 1e308, float("nan"), [[1]]]
ODD_VALUES += ["\x00", "\u202e", -(10**30), {"a": {"a": []}}, float("inf")]
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass
class Input:
    """The input of a command: a folder and options. ``what`` describes its change."""

    folder: Path
    command: str
    options: dict[str, Any]
    more: list[str] = field(default_factory=list)
    what: str = ""

    def argv(self) -> list[str]:
        argv = [self.command]
        for name, value in self.options.items():
            argv += [name, *map(str, value if isinstance(value, list) else [value])]
        return [*argv, *self.more]


def damage(path: Path, random: Random) -> str:
    """Make a file invalid for its format, and return a description of the damage."""
    content = path.read_bytes()
    how = random.choice(["truncated", "empty", "binary", "directory", "missing", "utf-16", "zeros"])
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: random.randrange(1, max(2, len(content.rstrip()) - 1))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "binary":
        path.write_bytes(b"\x93\xff" + random.randbytes(random.choice([1, 50, 5000])))
    elif how == "directory":
        path.mkdir()
    elif how == "utf-16":
        path.write_bytes(content.decode("latin-1").encode("utf-16"))
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    return f"{path.name} {how}"


def model_file(given: Input, random: Random) -> str:
    name = random.choice(["student", "student", "teacher"])
    if given.command == "eval":
        name = "student"
    given.what = damage(given.folder / name / random.choice(MODEL_FILES), random)
    return REFUSED


def other_model_file(given: Input, random: Random) -> str:
    name = random.choice(["tokenizer_config.json", "generation_config.json"])
    given.what = damage(given.folder / "student" / name, random)
    return CLEAN


def change_value(path: Path, random: Random, *more: str) -> str:
    """Change the value of a random key of a JSON file or of ``more``, and describe the change."""
    record = json.loads(path.read_text())
    key = random.choice([*sorted(record), *more])
    record[key] = random.choice(ODD_VALUES)
    path.write_text(json.dumps(record))
    return f"{path.name}: {key}={record[key]!r:.40}"


def model_config(given: Input, random: Random) -> str:
    given.what = change_value(given.folder / "student" / "config.json", random)
    return CLEAN


def tokenizer_value(given: Input, random: Random) -> str:
    path = given.folder / "student" / "tokenizer_config.json"
    given.what = change_value(path, random, "chat_template", "tokenizer_class", "auto_map")
    return CLEAN


def weights(given: Input, random: Random) -> str:
    """Change a random tensor in the student's weights."""
    path = given.folder / "student" / "model.safetensors"
    tensors = load_file(path)
    key = random.choice(sorted(tensors))
    how = random.choice(["shape", "missing", "extra", "nan", "header", "long"])
    if how == "shape":
        tensors[key] = torch.zeros(*tensors[key].shape, 2)
    elif how == "missing":
        del tensors[key]
    elif how == "extra":
        tensors["model.layers.7.odd"] = torch.zeros(2)
    elif how == "nan":
        tensors[key] = torch.full_like(tensors[key], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    if how == "header":
        content[:8] = random.randrange(2**63, 2**64).to_bytes(8, "little")
    elif how == "long":
        content += b"more"
    path.write_bytes(content)
    given.what = f"weights: {key} {how}"
    return REFUSED


BAD_ROWS = [
    b"[1]",
    b"1",
    b"null",
    b"{}",
    b'{"prompt": "a"}',
    b'{"prompt": 1, "completion": "a"}',
    b'{"prompt": "a", "completion": ""}',
    b'{"prompt": "a", "completion": []}',
    b'{"prompt": "a", "completion": [1]}',
    b'{"prompt": "a", "prompt": "b", "completion": "c"}',
    b'{"prompt": "a", "completion": "\\ud800"}',
    b'{"prompt": "\xff", "completion": "a"}',
    b'{"prompt": "a", "completion": NaN}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": {"role": "user", "content": "a"}}',
    b'{"prompt": "a", "completion": "b"} {}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"prompt": ' + b"9" * 10_000 + b', "completion": "a"}',
    b"\x00",
]


def bad_row(given: Input, random: Random) -> str:
    path = given.folder / "train.jsonl"
    lines = path.read_bytes().splitlines()
    row = random.choice(BAD_ROWS)
    lines.insert(random.randrange(len(lines) + 1), row)
    path.write_bytes(b"\n".join(lines))
    given.what = f"row {row[:40]!r}"
    return REFUSED


def data_file(given: Input, random: Random) -> str:
    given.what = damage(given.folder / "train.jsonl", random)
    return CLEAN if "truncated" in given.what else REFUSED


def harmless_data(given: Input, random: Random) -> str:
    path = given.folder / "train.jsonl"
    content = path.read_bytes()
    changes: dict[str, Callable[[bytes], bytes]] = {
        "BOM": lambda x: b"\xef\xbb\xbf" + x,
        "CRLF": lambda x: x.replace(b"\n", b"\r\n"),
        "blank lines": lambda x: x.replace(b"\n", b"\n \t\n"),
        "another key": lambda x: x.replace(b'{"prompt"', b'{"more": [1, {}], "prompt"'),
        "no end of line": lambda x: x.rstrip(),
        "escapes": lambda x: x.replace(b"cat", b"c\\u0061t"),
    }
    given.what = random.choice(sorted(changes))
    path.write_bytes(changes[given.what](content))
    return SAME


NUMBERS = ["-1", "nan", "x", "", "1e999", "0x10", "--", "1,5", "-inf"]
BAD_OPTIONS: dict[str, dict[str, list[str]]] = {
    "train": {
        "--beta": [*NUMBERS, "0", "1", "2"],
        "--distill_temperature": [*NUMBERS, "0"],
        "--kd_ratio": [*NUMBERS, "1.5"],
        "--lens_coeff": NUMBERS,
        "--mse_coeff": NUMBERS,
        "--max_length": [*NUMBERS, "0", "1", "2.5"],
        "--max_prompt_length": [*NUMBERS, "0", "2.5"],
        "--num_lens_pairs": [*NUMBERS, "9", "1000000000000"],
        "--lens_divergence": ["kl", "", "JSD", "akl"],
        "--final_divergence": ["kl", "", "2*", "jsd+jsd", "nan*jsd", "-1*jsd", "akl+jsd"],
        "--vocab_size": [*NUMBERS, "0", "65", "1000000000000000"],
        "--grad_threshold": ["-1", "nan", "x", "inf"],
        "--lens_backend": ["cuda", ""],
        "--student_blocks": ["0", "-1", "9", "x", "1 1"],
        "--student_layers": ["0", "9", "x", "1"],
        "--student_dtype": ["int8", ""],
        "--prompt_style": ["llama", ""],
        "--lora_r": ["-1", "x", "nan"],
        "--learning_rate": ["x", "nan", "-1", "inf"],
        "--preset": ["none", ""],
        "--config": ["none.yaml", "/", ""],
        "--teacher_cache_dtype": ["int8"],
        "--no_such_option": ["1"],
        "--per_device_train_batch_size": ["x", "0", "-1"],
        "--gradient_accumulation_steps": ["x", "0", "-1"],
        "--max_steps": ["x", "1.5"],
        "--num_train_epochs": ["x", "nan"],
        "--max_grad_norm": ["x", "nan"],
        "--seed": ["x", "-1", "99999999999999999999999"],
        "--save_steps": ["x", "0"],
        "--logging_steps": ["x", "nan"],
        "--save_strategy": ["never"],
        "--data": ["", "/", "none", "\udcff"],
        "--student": ["", "/", "none", "../../etc", "a/b/c/d", "\udcff", "a\x00b"],
        "--teacher": ["", "/", "none"],
    },
    "eval": {
        "--max_length": [*NUMBERS, "0"],
        "--max_prompt_length": [*NUMBERS, "0"],
        "--max_new_tokens": [*NUMBERS, "0"],
        "--batch_size": [*NUMBERS, "0"],
        "--seeds": [*NUMBERS, "1 1", "1.5", "99999999999999999999999"],
        "--temperature": [*NUMBERS, "0"],
        "--top_p": [*NUMBERS, "0", "1.5"],
        "--top_k": NUMBERS,
        "--no_repeat_ngram_size": NUMBERS,
        "--dtype": ["int8", ""],
        "--device": ["", "nowhere", "cuda:99", "cpu:-5"],
        "--prompt_style": ["llama", ""],
        "--rouge_tokenizer": ["none", ""],
        "--student": ["", "/", "none", "a/b/c/d"],
        "--data": ["", "/", "none"],
        "--nothing": ["1"],
    },
    "inspect": {
        "--top_k": [*NUMBERS, "0", "65", "1000000000000"],
        "--max_tokens": [*NUMBERS, "0"],
        "--vocab_size": [*NUMBERS, "0", "65", "1000000000000000"],
        "--beta": [*NUMBERS, "0", "1"],
        "--divergence": ["kl", "", "akl"],
        "--layers": ["0:0", "1", "9:9", "1:1:1", "a:b", "-1:1", ":"],
        "--student": ["", "/", "none"],
        "--text": [""],
        "--data": ["", "/", "none", "none.txt"],
        "--dtype": ["int8", ""],
        "--device": ["", "nowhere", "cuda:99"],
        "--max_texts": [*NUMBERS, "0"],
        "--nothing": ["1"],
    },
    "demo": {"--steps": [*NUMBERS, "0"], "--seed": ["x", "", "1.5"], "--nothing": ["1"]},
    "tune": {"--vocab": [*NUMBERS, "0"], "--dtype": ["int8", ""], "--tokens": [*NUMBERS, "0"]},
    "env": {"--nothing": ["1"], "more": [""]},
}


def option(given: Input, random: Random) -> str:
    given.command = random.choice(sorted(BAD_OPTIONS)) if random.random() < 0.2 else given.command
    choices = BAD_OPTIONS[given.command]
    name = random.choice(sorted(choices))
    value = random.choice(choices[name])
    if given.command in ("demo", "tune", "env"):
        given.options = {}
    given.more += [name, *value.split(" ")]
    given.what = f"{name} {value!r}"
    return REFUSED


def repeated(given: Input, random: Random) -> str:
    """Repeat an option with the same valid value."""
    name = random.choice(sorted(given.options))
    value = given.options.pop(name)
    wrong = value if isinstance(value, list) else [value]
    given.options = {name: wrong, **given.options}
    given.more += [name, *map(str, wrong)]
    given.what = f"{name} twice"
    return SAME


BAD_YAML = [
    b"beta: [1, 2]",
    b"beta: {a: 1}",
    b"beta: 0.3\nbeta: 0.4",
    b"? [1, 2]\n: 3",
    b"beta: !!python/object/apply:os.system [exit]",
    b"- a\n- b",
    b"just text",
    b"beta: \xff\xfe",
    b"beta: 0.3: 4",
    b"beta: .nan",
    b"max_length: 1.5",
    b"max_length: 1_0_x",
    b"student_layers: 1: 2",
    b"a: &a [*a]",
    b"lens_norm: maybe",
    b"1: 2",
    b"null: 2",
    b"\x00",
    b"\tbeta: 1",
    b"x: " + b"[" * 5000,
    b"beta: 2001-01-01",
    b"max_length: " + b"9" * 5000,
]


def options_file(given: Input, random: Random) -> str:
    given.command, given.options = "train", dict(given.options)
    path = given.folder / "options.yaml"
    text = random.choice(BAD_YAML)
    path.write_bytes(text)
    given.more += ["--config", str(path)]
    given.what = f"file of options {text[:40]!r}"
    return REFUSED


def checkpoint(given: Input, random: Random) -> str:
    """Damage a file of an interrupted run.

    The command may refuse to resume, or resume with the same result.
    """
    shutil.copytree(given.folder / "interrupted", given.folder / "out")
    files = sorted(x for x in (given.folder / "out").rglob("*") if x.is_file())
    path = random.choice(files)
    given.what = f"{path.parent.name}/{damage(path, random)}"
    return EITHER


def checkpoint_value(given: Input, random: Random) -> str:
    """Change a random value in a JSON file of an interrupted run."""
    shutil.copytree(given.folder / "interrupted", given.folder / "out")
    names = ["checkpoint-1/trainer_state.json", "checkpoint-2/trainer_state.json"]
    path = given.folder / "out" / random.choice(names)
    given.what = f"{path.parent.name}/{change_value(path, random)}"
    return CLEAN


def cache_file(given: Input, random: Random) -> str:
    """Damage a random file of the teacher cache."""
    given.options["--teacher_cache"] = given.folder / "cache"
    files = sorted(x for x in (given.folder / "cache").rglob("*") if x.is_file())
    path = random.choice([x for x in files if x.suffix != ".lock"])
    given.what = f"cache {path.parent.name}/{damage(path, random)}"
    return EITHER


def cache_manifest(given: Input, random: Random) -> str:
    """Change values in the manifest of the teacher cache, and update the manifest's checksum."""
    from lens_kernels.hf.cache.key import digest, json_bytes

    given.options["--teacher_cache"] = given.folder / "cache"
    path = given.folder / "cache" / "train" / "manifest.json"
    fields = json.loads(path.read_text())
    fields.pop("checksum")
    holder = random.choice([fields, fields["key"], fields["widths"], fields["shards"][0]])
    key = random.choice(sorted(holder))
    crafted = ["../../student/model.safetensors", "/etc/passwd", "\x00", "a/../b"]
    holder[key] = random.choice([*ODD_VALUES, *crafted])
    fields["checksum"] = digest([json_bytes(fields)])
    path.write_text(json.dumps(fields))
    given.what = f"manifest: {key}={holder[key]!r:.40}"
    return EITHER


ANY_COMMAND = [model_file, other_model_file, model_config, tokenizer_value, weights, option]
MUTATIONS = {
    "train": [*ANY_COMMAND, option, data_file, bad_row, harmless_data, repeated, options_file]
    + [checkpoint, checkpoint, checkpoint_value, cache_file, cache_manifest],
    "eval": [*ANY_COMMAND, option, data_file, bad_row, harmless_data, repeated],
    "inspect": [*ANY_COMMAND, repeated],
}
COMMANDS = ("train", "train", "train", "eval", "inspect")


def mutated(valid: dict[str, Input], folder: Path, seed: int) -> tuple[Input, str]:
    """Return a valid input in ``folder`` with a random change by ``seed``, and the expected
    outcome."""
    random = Random(seed)
    command = COMMANDS[seed % len(COMMANDS)]
    model = valid[command]
    options = {
        name: folder / x.relative_to(model.folder) if isinstance(x, Path) else x
        for name, x in model.options.items()
    }
    given = Input(folder, command, options)
    outcome = random.choice(MUTATIONS[command])(given, random)
    return given, outcome
