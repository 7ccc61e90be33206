"""Keys of teacher caches change with everything that affects the states. Caches are built once."""

import copy
import threading
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch

from lens_kernels.hf.cache import key as cache_key
from lens_kernels.hf.cache import store
from lens_kernels.hf.cache.store import CacheKey, TeacherCache, counted_positions
from tests.support import tiny

HANG = 120  # a thread that runs for more seconds than this has hung
EXAMPLES = [
    {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]},
    {"input_ids": [7, 8], "labels": [7, 8]},
]


@pytest.fixture(scope="module")
def model():
    return tiny.model(layers=2)


def key_of(model, examples=EXAMPLES, layers=(1,), tokenizer=None, dtype="float32"):
    return CacheKey.of(model, examples, layers, tokenizer, dtype)


def test_equal_models_have_one_key_whatever_their_path(model):
    other = tiny.model(layers=2)
    other.config._name_or_path, other.config.transformers_version = "elsewhere", "0"
    assert key_of(other) == key_of(model)


def test_key_does_not_depend_on_read_size_or_strides(model, monkeypatch):
    whole = key_of(model)
    monkeypatch.setattr(cache_key, "CHUNK", 24)
    assert key_of(model) == whole
    strided = copy.deepcopy(model)
    weight = strided.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous() and key_of(strided) == whole


def test_dtype_and_shape_of_weights_change_the_key(model):
    for change in (lambda w: w.view(torch.int32), lambda w: w.flatten()):
        changed = copy.deepcopy(model)
        changed.register_buffer("extra", torch.ones(2, 3))
        before = key_of(changed)
        changed.extra = change(changed.extra)
        assert key_of(changed).model != before.model


def test_models_on_the_meta_device_are_refused(model):
    with pytest.raises(ValueError, match="must hold its weights, but .* meta device: load it"):
        key_of(copy.deepcopy(model).to("meta"))


def test_tokens_may_be_lists_arrays_or_tensors(model):
    want = key_of(model)
    for kind in (torch.tensor, np.array):
        assert key_of(model, [{k: kind(v) for k, v in x.items()} for x in EXAMPLES]) == want


def test_boundaries_between_examples_change_the_key(model):
    both = [{k: EXAMPLES[0][k] + EXAMPLES[1][k] for k in EXAMPLES[0]}]
    moved = [{k: x[k][a:b] for k in x} for x, a, b in ((both[0], 0, 3), (both[0], 3, 6))]
    # ``one`` and ``two`` have the same numbers in the same order, but one and two examples.
    one, two = [{"input_ids": [1, 2], "labels": [1, 2]}], [{"input_ids": [1], "labels": [2]}] * 2
    cuts = (EXAMPLES, both, moved, EXAMPLES[:1], one, two)
    assert len({key_of(model, examples).data for examples in cuts}) == 6


def test_order_of_layers_does_not_change_the_key(model):
    assert key_of(model, layers=[2, 1, 2]) == key_of(model, layers=(1, 2))
    assert key_of(model, layers=[2, 1]).names == ["layer_1", "layer_2", "final"]


def test_storage_dtype_may_be_a_torch_dtype_or_a_name(model):
    assert key_of(model, dtype=torch.bfloat16) == key_of(model, dtype="bfloat16")
    with pytest.raises(TypeError, match="one of float32, bfloat16, float16, got int8"):
        key_of(model, dtype="int8")


def test_using_a_tokenizer_does_not_change_its_digest(model):
    tokenizer = tiny.tokenizer()
    before = key_of(model, tokenizer=tokenizer)
    tokenizer(["abc", "d"], padding=True, truncation=True, max_length=2)
    assert key_of(model, tokenizer=tokenizer) == before
    tokenizer.eos_token = "a"
    assert key_of(model, tokenizer=tokenizer) != before


def test_key_of_a_slow_tokenizer_depends_on_vocabulary_and_special_tokens(model):
    def digest(vocabulary, eos):
        special = {"eos_token": eos}
        slow = {"is_fast": False, "get_vocab": lambda: vocabulary, "special_tokens_map": special}
        return key_of(model, tokenizer=SimpleNamespace(**slow)).tokenizer

    want = digest({"a": 0, "b": 1}, "a")
    assert digest({"b": 1, "a": 0}, "a") == want
    assert want not in (digest({"a": 1, "b": 0}, "a"), digest({"a": 0, "b": 1}, "b"))


def test_adapters_change_the_key():
    def adapted(alpha):
        torch.manual_seed(0)
        modules = {"target_modules": ["v_proj", "q_proj"], "init_lora_weights": False}
        return peft.get_peft_model(
            tiny.model(layers=2), peft.LoraConfig(r=2, lora_alpha=alpha, **modules)
        )

    model = adapted(4)
    want = key_of(model)
    assert key_of(adapted(4)) == want
    # Only the adapter's scale differs. The weights are equal.
    assert key_of(adapted(8)).model != want.model
    with model.disable_adapter():
        assert key_of(model).model != want.model
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_B.default.weight.data[0, 0] += 1
    assert key_of(model).model != want.model


def states(batch):
    """Return random states in the shapes that the cache expects."""
    return [
        {name: torch.randn(len(counted_positions(x["labels"])), 3) for name in ("layer_1", "final")}
        for x in batch
    ]


def build(folder, key, run=states, examples=EXAMPLES, **options):
    options = {"batch_size": 2, "progress": False} | options
    return TeacherCache.build(folder, key, examples, run, **options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer_2": 0}, r"\['layer_1', 'final'\], got .*'layer_2'.*: use"),
        ({"final": [1]}, r"final as a tensor of shape .*, got list"),
        ({"final": torch.ones(3)}, r"\(counted .*, D\), got \(3,\)"),
        ({"final": torch.ones(2, 3)}, r"\(1, 3\) for example 1, got \(2, 3\): keep only"),
        ({"layer_1": torch.ones(1, 4)}, r"layer_1 .*got \(1, 4\)"),
        ({"final": torch.full((1, 3), 1e5)}, "1 with values not finite in float16: store bfloat16"),
        ({"final": torch.full((1, 3), torch.nan)}, "NaN in the teacher"),
    ],
    ids=["name", "list", "vector", "rows", "width", "large", "nan"],
)
def test_build_refuses_bad_results_of_run_teacher(tmp_path, model, change, match):
    def run(batch):
        first, second = states(batch)
        return [first, second | change]

    error = TypeError if "got list" in match else ValueError
    with pytest.raises(error, match=f"run_teacher .*{match}"):
        build(tmp_path, key_of(model, dtype="float16"), run)
    with pytest.raises(ValueError, match="one mapping for each of 2 examples, got 1"):
        build(tmp_path / "new", key_of(model), lambda batch: states(batch)[:1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"shard_examples": 0}, "shard_examples must be at least 1, got 0"),
        ({"shard_bytes": -1}, "shard_bytes must be at least 1, got -1"),
        ({"examples": []}, "examples is empty: pass at least one"),
        ({"examples": EXAMPLES[:1]}, "examples do not match key: make the key"),
    ],
)
def test_build_refuses_bad_arguments(tmp_path, model, options, match):
    with pytest.raises(ValueError, match=match):
        build(tmp_path / "new", key_of(model), **options)
    assert not (tmp_path / "new").exists()


def test_build_refuses_a_full_disk_before_writing(tmp_path, model, monkeypatch):
    free = SimpleNamespace(free=4 * 24 - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(RuntimeError, match="enough space: 4 rows of 24 bytes need .* pass another"):
        build(tmp_path, key_of(model), batch_size=1)
    assert not list(tmp_path.iterdir())
    free.free += 1
    assert len(build(tmp_path, key_of(model), batch_size=1)) == 2


@pytest.mark.parametrize("shown", [True, False])
def test_progress_counts_examples_and_can_be_silenced(tmp_path, model, capsys, shown):
    # The first call builds the cache, and the second call opens it.
    for _ in range(2):
        build(tmp_path, key_of(model), batch_size=1, progress=shown)
        printed = capsys.readouterr().err
        assert ("teacher cache: 100%" in printed and "2/2" in printed) == shown == bool(printed)


def test_build_disables_gradients_and_reports_size_and_summary(tmp_path, model):
    def run(batch):
        assert not torch.is_grad_enabled()
        return states(batch)

    cache = build(tmp_path, key_of(model), run)
    assert cache.nbytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert cache.summary() == f"teacher cache: 2 examples, 4 rows, 0.0 MiB, float32, {tmp_path}"


def test_second_builder_of_a_cache_waits_for_the_first(tmp_path, model, monkeypatch):
    """Threads play the two processes.

    The first continues only after the second logs that it waits.
    """
    folder, key, makers, said, found = tmp_path / "cache", key_of(model), [], [], []
    begun, waits = threading.Event(), threading.Event()

    def warn(message, *values):
        said.append(message % values)
        waits.set()

    def make(name):
        def run_teacher(batch):
            makers.append(name)
            begun.set()
            assert waits.wait(HANG)
            return states(batch)

        options = {"batch_size": 2, "progress": False}
        cache = TeacherCache.open_or_build(folder, key, EXAMPLES, run_teacher, **options)
        found.append(len(cache))

    monkeypatch.setattr(store._log, "warning", warn)
    first, second = (threading.Thread(target=make, args=(i,)) for i in (0, 1))
    first.start()
    assert begun.wait(HANG) and not said
    second.start()
    first.join(HANG), second.join(HANG)
    assert makers == [0] and found == [2, 2]
    assert said == [f"another process is building the teacher cache {folder}: waiting for it"]
