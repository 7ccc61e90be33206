"""The teacher cache returns exactly the stored states, or raises an error."""

import copy
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from lens_kernels.hf.cache import store as teacher_cache
from lens_kernels.hf.cache.key import digest, json_bytes
from lens_kernels.hf.cache.store import CacheKey, TeacherCache, counted_positions
from tests.support import tiny

LAYERS = (1, 3)
# The tests have nine examples. With at most 4 in each shard, they make three shards.
BATCH, SHARD = 2, 4


def make_examples():
    """Return nine examples of different lengths. In three of them, the loss counts no token."""
    generator, made = torch.Generator().manual_seed(0), []
    for length, prompt in [(6, 2), (9, 9), (4, 1), (7, 0), (1, 0), (8, 3), (5, 4), (0, 0), (6, 5)]:
        ids = torch.randint(2, 64, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


class Teacher:
    """A teacher that records its calls. The call with index ``fail_at`` raises an error."""

    def __init__(self, model, fail_at=None):
        self.model, self.fail_at, self.calls = model, fail_at, []

    def __call__(self, batch):
        if len(self.calls) == self.fail_at:
            raise RuntimeError("boom")
        self.calls.append(len(batch))
        return [self.one(example) for example in batch]

    def one(self, example):
        ids = torch.tensor([example["input_ids"] or [0]])
        hidden = self.model(ids, output_hidden_states=True).hidden_states
        states = {f"layer_{i}": hidden[i] for i in LAYERS} | {"final": hidden[-1]}
        at = counted_positions(example["labels"])
        return {name: x[0, at] for name, x in states.items()}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def examples():
    return make_examples()


@pytest.fixture(scope="module")
def key(model, examples):
    return CacheKey.of(model, examples, LAYERS, tiny.tokenizer(), torch.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory, model, examples, key):
    """Return a folder with a complete cache.

    Tests must not change the folder. They may change the copy ``own``.
    """
    folder = tmp_path_factory.mktemp("cache")
    build(folder, key, examples, Teacher(model))
    return folder


@pytest.fixture
def own(built, tmp_path):
    return shutil.copytree(built, tmp_path / "own")


def build(folder, key, examples, run, make=TeacherCache.build, **options):
    options = {"batch_size": BATCH, "shard_examples": SHARD, "progress": False} | options
    return make(folder, key, examples, run, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(model, examples, ids, dtype=torch.float32):
    with torch.no_grad():
        parts = [Teacher(model).one(examples[i]) for i in ids]
    return {name: torch.cat([x[name] for x in parts]).to(dtype) for name in parts[0]}


def assert_same(got, want):
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype and torch.equal(got[name], x), name


@pytest.mark.parametrize(
    ("labels", "at"),
    [([-100, -100, 5, 6], [1, 2]), ([5, -100, 7], [1]), ([5], []), ([], []), ([-100, -100], [])],
)
def test_position_counts_if_the_next_label_is_not_ignored(labels, at):
    assert counted_positions(labels).tolist() == at
    assert counted_positions(torch.tensor(labels, dtype=torch.int64)).tolist() == at
    with pytest.raises(ValueError, match=r"labels must be .* got shape \(2, 3\): pass one row"):
        counted_positions(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cache_returns_the_states_in_the_storage_dtype(tmp_path, model, examples, dtype):
    key = CacheKey.of(model, examples, LAYERS, dtype=dtype)
    build(tmp_path / "a" / "b", key, examples, Teacher(model))
    cache = TeacherCache.open(tmp_path / "a" / "b", key)
    assert len(cache) == len(examples)
    assert_same(cache.rows(range(9)), expected(model, examples, range(9), dtype))


def test_rows_may_be_read_in_any_order_and_repeatedly(built, key, model, examples, monkeypatch):
    monkeypatch.setattr(teacher_cache, "MAPPED_SHARDS", 2)
    cache = TeacherCache.open(built, key)
    before = len(pickle.dumps(cache))
    for ids in ([8, 0, 5, 0, 1, 3, 8], [4, 7], [2], torch.tensor([6, 0, 8])):
        assert_same(cache.rows(ids), expected(model, examples, ids))
    # At most two shards stay mapped. Shard 1 was used longest ago.
    assert list(cache._mapped) == [0, 2]
    assert len(pickle.dumps(cache)) == before
    # The first list has no ids. The second list has only examples in which the loss counts no
    # token.
    for ids in ([], [1, 4, 7]):
        assert {x.shape for x in cache.rows(ids).values()} == {(0, 16)}


def test_shards_may_hold_no_rows(tmp_path, model):
    examples = [{"input_ids": [3, 4], "labels": [-100, -100]}] * 3
    key = CacheKey.of(model, examples, LAYERS)
    cache = build(tmp_path, key, examples, Teacher(model), shard_examples=1, batch_size=1)
    assert cache.rows([2, 0])["final"].shape == (0, 16)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers_can_read_the_cache(built, key, model, examples, context):
    cache = TeacherCache.open(built, key)
    cache.rows(range(9))
    options = {"num_workers": 2, "collate_fn": cache.rows, "multiprocessing_context": context}
    loader = DataLoader(range(9), batch_size=4, **options)
    for got, ids in zip(loader, [range(4), range(4, 8), [8]], strict=True):
        assert_same(got, expected(model, examples, ids))


def test_unknown_examples_are_refused(built, key):
    cache = TeacherCache.open(built, key)
    for ids, match in (([9], r"lie in \[0, 8\], got 9: pass positions"), ([0, -1], "got -1")):
        with pytest.raises(IndexError, match=f"example_ids must .*{match}"):
            cache.rows(ids)
    with pytest.raises(TypeError, match="example_ids must be integers, got float: pass positions"):
        cache.rows([1.5])


def test_two_builds_write_identical_files_and_leave_no_partial_files(
    built, tmp_path, model, examples, key
):
    # If the first build is interrupted, it leaves a partial manifest.
    (tmp_path / "manifest.json.partial").write_text("{")
    build(tmp_path, key, examples, Teacher(model), make=TeacherCache.open_or_build)
    assert files(tmp_path) == files(built)
    shards = [f"shard-0000{i}.safetensors" for i in range(3)]
    assert sorted(files(tmp_path)) == ["manifest.json", *shards]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        ({"shard_examples": 1}, [(0, 2, 4), (2, 2, 9), (4, 2, 5), (6, 2, 1), (8, 1, 1)]),
        ({"shard_bytes": 12 * 3 * 16 * 4}, [(0, 2, 4), (2, 2, 9), (4, 4, 6), (8, 1, 1)]),
        ({"shard_bytes": 13 * 3 * 16 * 4}, [(0, 4, 13), (4, 4, 6), (8, 1, 1)]),
    ],
)
def test_shards_are_limited_by_examples_and_bytes_and_hold_whole_batches(
    tmp_path, model, examples, key, limit, wanted
):
    build(tmp_path, key, examples, Teacher(model), **limit)
    shards = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert [(s["first"], s["examples"], s["rows"]) for s in shards] == wanted


@pytest.mark.parametrize("fail_at", range(5))
def test_interrupted_build_resumes_after_its_last_whole_shard(
    built, tmp_path, model, examples, key, fail_at
):
    folder = tmp_path / "cache"
    broken = Teacher(model, fail_at)
    with pytest.raises(RuntimeError, match="boom"):
        build(folder, key, examples, broken)
    if fail_at:
        with pytest.raises(ValueError, match=f"only {fail_at // 2} of 3 shards.*open_or_b"):
            TeacherCache.open(folder, key)
    again = Teacher(model)
    build(folder, key, examples, again, make=TeacherCache.open_or_build)
    assert len(again.calls) == 5 - fail_at // 2 * 2
    assert files(folder) == files(built)


def test_build_replaces_damaged_shards_and_open_or_build_refuses_them(
    own, built, model, examples, key
):
    teacher = Teacher(model)
    build(own, key, examples, teacher, make=TeacherCache.open_or_build)
    assert teacher.calls == []
    flip(own / "shard-00001.safetensors")
    with pytest.raises(ValueError, match="shard-00001.safetensors is damaged"):
        build(own, key, examples, teacher, make=TeacherCache.open_or_build)
    # The new batch size and shard size apply only to new shards: existing shards are kept.
    build(own, key, examples, teacher, batch_size=1, shard_examples=1)
    assert teacher.calls == [1, 1, 1, 1]
    # The batch size does not change the states, because ``Teacher`` runs one example at a time.
    assert files(own) == files(built)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit(path):
    path.write_text(path.read_text().replace('"first": 4', '"first": 5'))


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("shard-00001.safetensors", flip, "is damaged: its checksum"),
        ("shard-00002.safetensors", truncate, r"is damaged: \d+ bytes long, not \d+"),
        ("shard-00000.safetensors", lambda p: p.unlink(), "is missing"),
        ("manifest.json", edit, "is damaged: its checksum differs"),
        ("manifest.json", truncate, "cannot be read"),
        ("manifest.json", lambda p: p.write_bytes(b"\xff"), "cannot be read"),
        ("manifest.json", lambda p: p.write_text("[]"), "cannot be read"),
        ("manifest.json", lambda p: p.write_text("{}"), "cannot be read"),
    ],
)
def test_open_refuses_damaged_files(own, key, file, change, match):
    change(own / file)
    message = f"own is refused: {file} {match}.*; delete the folder .* pass an"
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(own, key)


def craft(folder, change):
    """Change the manifest and give it a matching checksum."""
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["checksum"]
    change(fields)
    fields["checksum"] = digest([json_bytes(fields)])
    (folder / "manifest.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("name", ["../x", "{outside}", "shard-00001.safetensors", "x", 3])
@pytest.mark.parametrize("open_it", [False, True])
def test_no_file_that_a_manifest_names_is_touched(own, key, model, examples, name, open_it):
    outside = own.parent / "x"
    outside.write_text("mine")
    shard = {"file": str(outside) if name == "{outside}" else name, "checksum": None, "size": None}
    craft(own, lambda fields: fields["shards"][0].update(shard))
    before = files(own)
    with pytest.raises(ValueError, match=r"refused: manifest\.json does not describe the files"):
        TeacherCache.open(own, key) if open_it else build(own, key, examples, Teacher(model))
    assert outside.read_text() == "mine" and files(own) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("shards"),
        lambda fields: fields.update(shards=3),
        lambda fields: fields.update(shards=[]),
        lambda fields: fields.update(shards=[{}]),
        lambda fields: fields.update(key=3),
        lambda fields: fields["key"].pop("data"),
        lambda fields: fields.update(widths={"final": 16}),
        lambda fields: fields["widths"].update(final="16"),
        lambda fields: fields["shards"][1].update(first=0),
        lambda fields: fields["shards"][1].update(rows=-1),
    ],
)
def test_a_manifest_of_another_shape_is_refused(own, key, model, examples, change):
    craft(own, change)
    for run in (
        lambda: TeacherCache.open(own, key),
        lambda: build(own, key, examples, Teacher(model), TeacherCache.open_or_build),
    ):
        with pytest.raises(ValueError, match="is refused: "):
            run()


@pytest.mark.parametrize("name", ["manifest.json.partial", "shard-00000.safetensors.partial"])
def test_a_planted_link_is_not_followed(own, key, model, examples, name):
    outside = own.parent / "x"
    outside.write_text("mine")
    (own / name).symlink_to(outside)
    (own / "shard-00000.safetensors").unlink()
    build(own, key, examples, Teacher(model))
    assert outside.read_text() == "mine"
    assert TeacherCache.open(own, key).nbytes and not (own / name).exists()
    assert not (own / "manifest.json").is_symlink()


def masked(examples):
    return [x | {"attention_mask": [1] * len(x["labels"])} for x in examples]


# Each case has an argument of ``CacheKey.of``, a change of this argument, and the expected message.
@pytest.mark.parametrize(
    ("argument", "change", "match"),
    [
        ("model", lambda x: x.lm_head.weight[-1, -1].add_(1e-6), "by another model: its config"),
        ("model", lambda x: x.model.rotary_emb.inv_freq[-1].mul_(2), "made by another model"),
        ("model", lambda x: setattr(x.config, "rms_norm_eps", 1.0), "made by another model"),
        ("examples", lambda x: x[5].update(labels=x[4]["labels"]), "other data: its tokens or"),
        ("examples", list.reverse, "made from other data"),
        ("examples", lambda x: x.__setitem__(slice(None), masked(x)), "made from other data"),
        ("layers", lambda x: x.remove(1), r"other layers: found \[1, 3\], expected \[3\]"),
        ("tokenizer", lambda x: x.add_tokens(["new"]), "made with another tokenizer"),
        ("tokenizer", None, "made with another tokenizer"),
        ("dtype", None, "another dtype: found float32, expected bfloat16"),
    ],
    ids=[
        "weight",
        "rotary",
        "config",
        "labels",
        "order",
        "mask",
        "layers",
        "vocabulary",
        "tokenizer",
        "dtype",
    ],
)
@torch.no_grad()
def test_cache_with_another_key_is_refused_and_unchanged(
    built, model, examples, argument, change, match
):
    given = {"model": model, "examples": examples, "layers": [*LAYERS], "dtype": "float32"}
    given["tokenizer"] = tiny.tokenizer()
    if change is None:
        given[argument] = {"tokenizer": None, "dtype": torch.bfloat16}[argument]
    else:
        given[argument] = copy.deepcopy(given[argument])
        change(given[argument])
    key, before = CacheKey.of(**given), files(built)
    with pytest.raises(ValueError, match=f"is refused: .*{match}.*pass another"):
        TeacherCache.open(built, key)
    for make in (TeacherCache.build, TeacherCache.open_or_build):
        with pytest.raises(ValueError, match=match):
            build(built, key, given["examples"], None, make=make)
    assert files(built) == before


def test_error_names_every_difference_or_only_the_format(built, key):
    other = CacheKey("", key.data, (2,), key.tokenizer, key.dtype)
    with pytest.raises(ValueError, match="another model: .*; made for other layers: .*; de"):
        TeacherCache.open(built, other)
    with pytest.raises(ValueError, match="refused: .* another format: found 4, expected 3; d"):
        TeacherCache.open(built, replace(other, format=3))


def test_folder_without_a_cache_is_refused_and_unchanged(tmp_path, examples, key):
    (tmp_path / "thesis.txt").write_text("mine")
    for make in (TeacherCache.build, TeacherCache.open_or_build):
        with pytest.raises(ValueError, match="holds no teacher cache: it has no manifest.json"):
            build(tmp_path, key, examples, None, make=make)
    with pytest.raises(ValueError, match="nothing holds no teacher cache.* build one"):
        TeacherCache.open(tmp_path / "nothing", key)
    assert list(files(tmp_path)) == ["thesis.txt"]
