"""Every option of ``lens-kernels train`` arrives in the configuration and has its effect."""

from dataclasses import fields

import pytest
import torch
import yaml

from lens_kernels import cli
from lens_kernels.hf import LensDistillConfig
from lens_kernels.hf.model import placement
from lens_kernels.hf.model.loading import load_model
from lens_kernels.hf.training import command
from tests.support import tiny
from tests.support.commands import arguments, first_loss, weights, write_rows
from tests.support.training import logged, trained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# For each option of this project, all values that a test passes. None of them is the default, and
# an option with choices has all its other choices.
GIVEN = yaml.safe_load("""{
student: [s], data: [d], teacher: [t], eval_data: [e], student_blocks: [[1, 3]],
student_dtype: [auto, bfloat16, float16], teacher_dtype: [float32, bfloat16, float16],
teacher_quantization: [4bit, 8bit], teacher_device_map: [cpu, auto],
prompt_style: [chat], max_length: [8], max_prompt_length: [9],
lora_r: [2], lora_alpha: [5], lora_dropout: [0.25], lora_target_modules: [[q_proj, v_proj]],
allow_download: [true], output_dir: [o], student_layers: [[2]], teacher_layers: [[1]],
num_lens_pairs: [1], lens_divergence: [jeffreys, forward_kl, reverse_kl, tvd, hellinger],
lens_coeff: [2.0], lens_norm: [false], final_divergence: [akl, 0.5*forward_kl + 2*tvd],
beta: [0.3], distill_temperature: [2.0], teacher_temperature: [3.0], temperature_squared: [true],
standardize: [lens, all], token_clip: [4.0], teacher_targets: [g], kd_ratio: [0.5],
mse_coeff: [0.01], vocab_size: [56], student_lens: [x], teacher_lens: [y],
train_student_lens: [true],
lens_backend: [torch, triton, row_kernel, cluster_kernel, reference], grad_threshold: [bf16],
teacher_cache: [c], teacher_cache_dtype: [bfloat16, float16], logging_steps: [3],
save_total_limit: [3], on_policy: [0.25],
streaming: [true], shuffle_buffer: [5], packing: [true], truncation: [drop, error],
}""")


def own_fields(kind):
    return [x for x in fields(kind) if x.name in kind.__annotations__]


def test_every_option_and_choice_reaches_the_configuration(monkeypatch):
    # pretend that the package is installed
    monkeypatch.setattr(placement, "find_spec", lambda name: name)
    found = {x.name: x for kind in (command.RunConfig, LensDistillConfig) for x in own_fields(kind)}
    assert found.keys() == GIVEN.keys()
    for name, option in found.items():
        if "choices" in option.metadata:
            default = set() if option.default is None else {option.default}
            assert {*default, *GIVEN[name]} == set(option.metadata["choices"]), name
    for turn in range(max(map(len, GIVEN.values()))):
        given = {name: values[min(turn, len(values) - 1)] for name, values in GIVEN.items()}
        if given["lens_backend"] == "reference":
            del given["grad_threshold"]
        # The first turn samples answers, which caches, sparse targets and packing do not support.
        for name in (
            ("teacher_cache", "teacher_targets", "packing") if turn == 0 else ("on_policy",)
        ):
            del given[name]
        argv = []
        for name, value in given.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        config, args, chosen = command.parse(argv)
        for name, value in given.items():
            holder = config if hasattr(config, name) else args
            assert getattr(holder, name) == value != found[name].default, name
        assert chosen == given


def test_variants_reach_the_loss_function():
    words = "--student s --data d --output_dir o --teacher_temperature 3 --token_clip 4".split()
    for name, value in (("none", False), ("lens", "lens"), ("all", True)):
        options = command.parse([*words, "--standardize", name])[1].loss_options()
        assert options["standardize"] == value and options["temperature_squared"] is False
        assert (options["teacher_temperature"], options["token_clip"]) == (3.0, 4.0)


@pytest.fixture(scope="module")
def plain_loss(files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_kernels.hf.training.report.loss_figure", lambda *_: None)
        return first_loss(files, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_change_the_loss_only_by_rounding(files, tmp_path, plain_loss, dtype):
    # float16 weights cannot be trained, so the student gets an adapter. A new adapter does not
    # change the loss.
    adapter = {"lora_r": 2, "lora_target_modules": ["q_proj"]} if dtype == "float16" else {}
    for name, more in (("student_dtype", adapter), ("teacher_dtype", {})):
        loss = first_loss(files, tmp_path / name, **{name: dtype}, **more)
        assert loss == pytest.approx(plain_loss, rel=8 * torch.finfo(DTYPES[dtype]).eps)
        assert loss != pytest.approx(plain_loss, rel=1e-6), name
    trained = weights(tmp_path / "student_dtype")
    trained = {x.dtype for name, x in trained.items() if not adapter or "lora_" in name}
    assert trained == {torch.float32 if adapter else torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [{"max_length": 8}, {"max_prompt_length": 9}, {"seed": 5}, {"kd_ratio": 0.0, "teacher": None}],
    ids=str,
)
def test_options_of_models_and_data_change_the_loss(files, tmp_path, plain_loss, options):
    assert first_loss(files, tmp_path, **options) != pytest.approx(plain_loss, rel=1e-6)


def test_student_blocks_select_the_students_blocks(files, tmp_path):
    first_loss(files, tmp_path, student_blocks=[1, 3], num_lens_pairs=1, learning_rate=1e-12)
    start, end = (
        [layer.mlp.up_proj.weight for layer in load_model(str(folder)).model.layers]
        for folder in (files / "student", tmp_path)
    )
    torch.testing.assert_close(end, [start[0], start[2]])


def test_prompt_style_selects_the_template(files, tmp_path, capsys):
    asked, verbatim, student = (tmp_path / x for x in ("asked", "verbatim", "student"))
    write_rows(asked, [{"instruction": "sing", "output": "la la"}])
    write_rows(verbatim, [{"prompt": "(sing)= ", "completion": "la la"}])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ '(' + m.content + ')= ' if m.role == 'user' else m.content }}"
        "{% endfor %}"
    )
    tiny.model(layers=3, seed=1).save_pretrained(student)
    tokenizer.save_pretrained(student)
    chat, alpaca, expected = (
        first_loss(files, tmp_path / str(i), data=train, prompt_style=style, student=student)
        for i, (train, style) in enumerate(
            [(asked, "chat"), (asked, "alpaca"), (verbatim, "alpaca")]
        )
    )
    assert chat == pytest.approx(expected, rel=1e-6)
    assert chat != pytest.approx(alpaca, rel=1e-3)
    assert cli.main(arguments(files, tmp_path / "out", data=asked, prompt_style="chat")) == 1
    assert "template" in capsys.readouterr().err


def test_all_linear_modules_get_an_adapter(files, tmp_path):
    first_loss(files, tmp_path, lora_r=2, lora_target_modules=["all-linear"])
    adapted = {name.split(".lora_A")[0] for name in weights(tmp_path) if ".lora_A" in name}
    linear = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {name.rpartition(".")[2] for name in adapted} == linear and len(adapted) == 3 * 7


@pytest.mark.parametrize("text", ["no", "'no'", "off"])
def test_strategies_in_an_options_file_may_be_no(files, tmp_path, text):
    config = tmp_path / "run.yaml"
    config.write_text(f"save_strategy: {text}\neval_strategy: {text}\nlens_norm: {text}\n")
    _, args, chosen = command.parse(arguments(files, tmp_path / "out", config=config)[1:])
    assert (args.save_strategy, args.eval_strategy, args.lens_norm) == ("no", "no", False)
    assert chosen["save_strategy"] == "no"


@pytest.mark.parametrize("download", [False, True])
def test_models_are_downloaded_only_if_allowed(files, tmp_path, monkeypatch, download):
    asked = []

    def watch(name, at):
        load = getattr(command, name)

        def offline(*given):
            asked.append(given[at])
            return load(*given[:at], False, *given[at + 1 :])

        monkeypatch.setattr(command, name, offline)

    watch("load_model", 2), watch("load_tokenizer", 1)
    argv = arguments(files, tmp_path, max_steps=1, save_strategy="no")
    assert cli.main([*argv, "--allow_download"] if download else argv) == 0
    assert asked == [download] * 4


def test_grad_threshold_logs_the_dropped_share(tmp_path):
    def dropped(**options):
        more = {"batch": 2, "max_steps": 1, "eval_strategy": "steps"}
        return logged(trained(tmp_path, **more, **options), "dropped", having="dropped")

    assert dropped() == []
    assert dropped(grad_threshold=1000) == dropped(accumulate=2, grad_threshold=1000) == [1.0]
    (few,), (some,) = dropped(grad_threshold="bf16"), dropped(grad_threshold="1e-2")
    assert 0.0 <= few < 1e-3 < some < 1.0


def test_a_file_of_options_is_utf_8(files, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_bytes("run_name: é\n".encode())
    _, args, chosen = command.parse(arguments(files, tmp_path, config=config)[1:])
    assert args.run_name == chosen["run_name"] == "é"
    config.write_bytes("run_name: é\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        command.parse(arguments(files, tmp_path, config=config)[1:])
    assert f"--config {config}: 'utf-8' codec can't decode byte" in capsys.readouterr().err


def test_a_key_that_is_twice_in_a_file_is_refused(files, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    for text in ("beta: 0.3\nseed: 1\nbeta: 0.4\n", "a: 1\nb:\n  {beta: 1, beta: 2}\n"):
        config.write_text(text)
        with pytest.raises(SystemExit):
            command.parse(arguments(files, tmp_path / "out", config=config)[1:])
        shown = capsys.readouterr().err
        assert f"{config}: not YAML: line 3: the key 'beta' occurs twice" in shown
