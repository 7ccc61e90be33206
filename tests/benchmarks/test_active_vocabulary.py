"""The benchmark of ``grad_threshold``: its errors, shares, files, verdict and figure."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from benchmarks import active_vocabulary as bench
from benchmarks.support import plot, tables, timing
from benchmarks.support.shapes import Inputs
from lens_kernels import LensNorm, cli
from lens_kernels.hf.model.loading import load_model
from reference.dense import divergence, lens_logits, softmax
from tests.support import commands, tiny
from tests.support.grids import Shape
from tests.support.problems import with_few_active_entries

pytestmark = pytest.mark.hf
# In each response, the letters and an EOS token have labels.
COUNTED = sum(len(word) + 1 for word in commands.WORDS)
BLOCKS, STUDENT_LAYERS, TEACHER_LAYERS = [1, 3, 4], [1, 2], [2, 3]
N, V, D = 24, 600, 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a teacher, data, and a student that was trained on the data."""
    folder = tmp_path_factory.mktemp("files")
    tiny.model(seed=2).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    commands.write_rows(folder / "train.jsonl", commands.ROWS)
    options = {"student": folder / "teacher", "student_blocks": BLOCKS, "num_lens_pairs": None}
    options |= {"student_layers": STUDENT_LAYERS, "teacher_layers": TEACHER_LAYERS}
    options |= {"max_steps": 2, "save_strategy": "no"}
    assert cli.main(commands.arguments(folder, folder / "trained", **options)) == 0
    return folder


def run(files, out, *options, trained=("trained",)):
    folders = [str(files / name) for name in trained]
    models = ["--teacher", str(files / "teacher"), "--trained", *folders]
    sizes = ["--data", str(files / "train.jsonl"), "--tokens", "20", "--rounds", "1"]
    bench.main([*models, *sizes, "--thresholds", "0", "1e-3", "--out", str(out), *options])
    return tables.read_csv(out / "active_vocabulary.csv")


def states(rows):
    return [*dict.fromkeys((row["run"], row["state"], row["group"]) for row in rows)]


def test_second_run_reuses_the_results_of_the_first(
    files, tmp_path, figures, clock, capsys, monkeypatch
):
    figure = tmp_path / "curve.png"
    options = "--figure", str(figure), "--rounds", "2"
    rows = run(files, tmp_path, *options)
    assert states(rows) == [("trained", x, y) for x in ("before", "after") for y in bench.GROUPS]
    names = ["floor", "bf16_rounding", "exact", "0.0", "0.001"]
    assert [row["threshold"] for row in rows] == names * 4
    for row in rows:
        assert (row["tokens"], row["vocab_entries"], row["student_blocks"]) == ("20", "64", "1 3 4")
        assert row["pairs"] == ("2" if row["group"] == "lens" else "1")
        assert {"device", "threads", "torch", "commit", "date_utc"} <= row.keys()
        if row["threshold"] == "0.0":
            assert max(float(row["hidden_error"]), float(row["head_error"])) < 1e-6
            assert float(row["used_share"]) > 0.9 and float(row["dropped_share"]) < 1e-6
    # Each call takes 1 s longer than the previous call. After 4 warm-up calls, two rounds make 4
    # calls each, in rotated order.
    columns = ("ratio_to_floor", "min_ratio_to_floor", "max_ratio_to_floor", "median_ms")
    assert [" ".join(row[name] for name in columns).strip() for row in rows[:4]] == [
        "1.000 1.000 1.000 9500.00",
        "",
        # 0.858 is the median of the two ratios. The ratio of the two medians would be 0.895.
        "0.858 0.625 1.091 8500.00",
        "0.784 0.750 0.818 7500.00",
    ]
    assert figure.stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "trained before, lens, both errors below" in printed and "bf16_rounding" in printed
    # A second run finds all results in the CSV, and measures nothing.
    monkeypatch.setattr(bench, "measure", None)
    assert run(files, tmp_path, *options) == rows
    assert "trained after: measured already" in capsys.readouterr().out


@pytest.mark.parametrize("group", bench.GROUPS)
def test_timed_runs_the_floor_and_the_loss_of_the_group(monkeypatch, group):
    asked, floors, inner = [], [], bench.symmetric_lens_loss

    def loss(*args, **options):
        asked.append((options["grad_threshold"], options["divergence"], len(args[0])))
        return inner(*args, **options)

    monkeypatch.setattr(bench, "symmetric_lens_loss", loss)
    monkeypatch.setattr(bench.products, "products", floors.append)
    chosen = problem(group)
    bench.timed(chosen, ["bf16"], 2)
    expected = (bench.GROUPS[group], 2 if group == "lens" else 1)
    assert asked.count((None, *expected)) == asked.count(("bf16", *expected)) == 3
    assert floors == [chosen.inputs] * 3


def problem(group="lens"):
    pairs = 2 if group == "lens" else 1
    norm = LensNorm("rms", 1 + 0.2 * torch.randn(D), eps=0.1) if group == "lens" else None
    made = with_few_active_entries(Shape((N,), V, D, D, pairs), norm)
    weights = made.student_head.weight, made.teacher_head.weight
    inputs = Inputs(made.student_hidden, made.teacher_hidden, *weights)
    return bench.Group(inputs, (made.student_head, made.teacher_head), bench.GROUPS[group])


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def dense_gradients(group):
    """Return the gradients of the logits by dense torch, one matrix for each pair."""
    sides, gradients = (group.inputs.student_hidden, group.inputs.teacher_hidden), []
    for pair in zip(*sides, strict=True):
        logits = (lens_logits(x, h, True, None) for x, h in zip(pair, group.heads, strict=True))
        z, teacher = (x.detach().requires_grad_() for x in logits)
        loss = divergence(group.divergence, softmax(teacher), softmax(z)).sum()
        gradients.append(torch.autograd.grad(loss, z)[0])
    return torch.stack(gradients)


@pytest.mark.parametrize("group", bench.GROUPS)
def test_errors_and_shares_match_the_dense_gradients(always_active, group):
    chosen = problem(group)
    *hidden, head = chosen.gradients(None)
    dense, thresholds = dense_gradients(chosen), [1e-5, 1e-4, 1e-3]
    rows = bench.judge(chosen, thresholds)
    for threshold in thresholds:
        row = {name: float(value) for name, value in rows[str(threshold)].items()}
        used = dense.abs().amax(1, keepdim=True) > threshold
        dropped = 1 - ((dense * used).abs().sum() / dense.abs().sum()).item()
        assert 0.02 < row["used_share"] < 0.9 and dropped > 1e-5
        assert row["used_share"] == pytest.approx(used.double().mean().item(), rel=1e-4)
        assert row["dropped_share"] == pytest.approx(dropped, rel=1e-2)
        *near, near_head = chosen.gradients(threshold)
        assert row["hidden_error"] == pytest.approx(max(map(relative, near, hidden)), rel=1e-2)
        assert row["head_error"] == pytest.approx(relative(near_head, head), rel=1e-2)


def test_bf16_rounding_row_uses_the_pair_with_the_smallest_error():
    chosen = problem()
    *_, head = exact = chosen.gradients(None)
    found = [relative(g.bfloat16().double(), g) for g in exact]
    # Errors are relative to the norm of the exact gradient.
    assert bench.errors([4 * head], [head]) == pytest.approx([3.0])
    row = bench.judge(chosen, [])["bf16_rounding"]
    assert found[0] != found[1]
    assert float(row["hidden_error"]) == pytest.approx(min(found[:2]), rel=5e-3)
    assert float(row["head_error"]) == pytest.approx(found[2], rel=5e-3)


def test_wrong_gradients_are_refused_before_timing(monkeypatch):
    monkeypatch.setattr(timing, "time_interleaved", None)
    chosen = problem()
    with pytest.raises(RuntimeError, match="1000.0: the gradient of the hidden state 0 has a rel"):
        bench.measure(chosen, [1e3], 1, {})
    chosen.inputs.student_hidden[1].data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="1e-05: .* state 1 .* error of nan, .*look for NaN in"):
        bench.measure(chosen, [1e-5], 1, {})
    values = iter([[0.0, 0.0], [0.0, 0.2]])
    monkeypatch.setattr(bench, "errors", lambda found, exact: next(values))
    with pytest.raises(RuntimeError, match="head has a relative error of 0.2, above the limit"):
        bench.measure(problem("final"), [1e-5], 1, {})


@pytest.mark.parametrize("state", ["before", "after"])
def test_states_come_from_the_cut_teacher_and_the_trained_student(files, state):
    (trained,) = bench.read_trained([files / "trained"])
    tokenizer = bench.load_tokenizer(str(files / "teacher"))
    examples = trained.examples(files / "train.jsonl", tokenizer, 20)
    # The two examples have 10 and 16 tokens, including EOS.
    assert len(examples) == 2
    batch = bench.Collator(1)(examples)
    teacher, student = (load_model(str(files / "teacher"), "float32") for _ in range(2))
    groups = bench.groups_of(trained, state, teacher, batch, 20)
    student.model.layers = nn.ModuleList(student.model.layers[i - 1] for i in BLOCKS)
    student.config.num_hidden_layers = len(BLOCKS)
    if state == "after":
        student = load_model(str(files / "trained"), "float32")
    at = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    for model, layers, side in ((student, STUDENT_LAYERS, 0), (teacher, TEACHER_LAYERS, 1)):
        with torch.no_grad():
            every = model(
                batch["input_ids"],
                batch["attention_mask"],
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        for name, depths in (("lens", layers), ("final", [-1])):
            inputs, head = groups[name].inputs, groups[name].heads[side]
            found = (inputs.student_hidden, inputs.teacher_hidden)[side]
            for x, depth in zip(found, depths, strict=True):
                torch.testing.assert_close(x, every[depth][at][:20], rtol=1e-5, atol=1e-5)
            assert (head.norm is None) == (name == "final")
            assert torch.equal(head.weight, model.lm_head.weight)
            assert torch.equal(head.weight, (inputs.student_head, inputs.teacher_head)[side])


def test_runs_with_equal_starts_share_the_state_before_training(files, tmp_path):
    for name in ("alike", "other"):
        shutil.copytree(files / "trained", files / name)
    record = files / "other" / "run.yaml"
    record.write_text(record.read_text().replace("max_steps: 2", "max_steps: 2\nmax_length: 20"))
    rows = run(files, tmp_path, trained=("trained", "alike", "other"))
    found = [" ".join(x[:2]) for x in states(rows) if x[2] == "lens"]
    both = [f"{name} {state}" for name in ("trained", "other") for state in ("before", "after")]
    assert found == [*both[:2], "alike after", *both[2:]]


def test_too_few_tokens_are_refused_before_any_model_is_loaded(files, tmp_path, monkeypatch):
    assert len(run(files, tmp_path / "all", "--tokens", str(COUNTED))) == 20
    monkeypatch.setattr(bench, "load_model", None)
    message = f"--tokens {COUNTED + 1} is too large: .* only {COUNTED} positions with a label"
    with pytest.raises(ValueError, match=f"{message}; pass --tokens {COUNTED}, or more data"):
        run(files, tmp_path, "--tokens", str(COUNTED + 1))
    (trained,) = bench.read_trained([files / "trained"])
    data = SimpleNamespace(examples=[{"labels": [5, -100, 6, 7]}])
    monkeypatch.setattr(bench, "load_examples", lambda *args, **options: data)
    with pytest.raises(ValueError, match="--tokens 3 is too large: .*2 positions with a label"):
        trained.examples(files / "train.jsonl", None, 3)


def test_unusable_trained_folders_are_refused(files, tmp_path):
    (tmp_path / "run.yaml").write_text("student: a\nteacher: a\ndata: b\noutput_dir: c\n")
    for folders, message in (
        (["teacher"], "holds no run.yaml: give a folder that lens-kernels"),
        ([tmp_path], "has no student_blocks, .* give a run with --student_bl"),
        (["trained"] * 2, r"different names, got \[.*trained.*, .*trained.*\]: rename them"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.read_trained([files / name for name in folders])


def test_results_with_other_settings_are_not_extended(files, tmp_path):
    run(files, tmp_path)
    before = (tmp_path / "active_vocabulary.csv").read_text()
    with pytest.raises(RuntimeError, match="with tokens '20', but this run has '21'; move the"):
        run(files, tmp_path, "--tokens", "21")
    assert (tmp_path / "active_vocabulary.csv").read_text() == before


def test_interrupted_run_keeps_its_results_and_resumes(files, tmp_path, monkeypatch):
    calls, inner = [], bench.measure

    def measure(*args):
        calls.append(1)
        return 1 / 0 if len(calls) == 4 else inner(*args)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(ZeroDivisionError):
        run(files, tmp_path)
    before = tables.read_csv(tmp_path / "active_vocabulary.csv")
    after = run(files, tmp_path)
    assert len(calls) == 5 and after[: len(before)] == before
    assert (len(states(before)), len(states(after))) == (3, 4)
    # With other thresholds, all hidden states are measured again.
    run(files, tmp_path, "--thresholds", "1e-4")
    assert len(calls) == 9


def curves():
    """Return CSV rows before and after training. The fastest threshold has too large an error."""
    lines = """floor    0.0  0     0     1.0
               exact    1.0  0     0     0.2
               1e-05    0.1  9e-4  2e-4  0.6
               1e-06    0.2  1e-5  2e-5  0.7
               0.0001   0.1  1e-5  2e-3  0.3
               0.001    0.1  2e-3  2e-5  0.3""".splitlines()
    columns = ("threshold", "used_share", "hidden_error", "head_error", "ratio_to_floor")
    more = dict.fromkeys(("tokens", "vocab_entries", "student_width", "teacher_width"), "8")
    more |= {"run": "4-1", "device": "a machine", "rounds": "3", "pairs": "2"}
    rows = []
    for state, shift in (("before", 0.1), ("after", 0.0)):
        for group, slow in (("lens", 0.0), ("final", 1.0)):
            for line in lines:
                row = dict(zip(columns, line.split(), strict=True))
                row["ratio_to_floor"] = f"{float(row['ratio_to_floor']) + shift + slow:g}"
                if row["threshold"] == "floor":
                    row |= dict.fromkeys(columns[1:4], "")
                rows.append(row | {"state": state, "group": group} | more)
    return rows


def test_verdict_is_the_fastest_threshold_with_both_errors_small():
    rows = curves()
    start = "lens, both errors below 0.001:"
    assert bench.verdicts(rows) == [
        f"4-1 before, {start} 0.700 of the floor at 1e-05, which is below 0.80",
        f"4-1 after, {start} 0.600 of the floor at 1e-05, which is below 0.80",
    ]
    for row in rows:
        row["ratio_to_floor"] = f"{float(row['ratio_to_floor']) + 0.1:g}"
    assert bench.verdicts(rows)[0].endswith("0.800 of the floor at 1e-05, which is not below 0.80")
    rows = [row for row in rows if row["threshold"] not in ("1e-06", "1e-05")]
    assert bench.verdicts(rows)[0] == f"4-1 before, {start} no threshold"


def test_the_picture_shows_the_larger_error_of_each_threshold(tmp_path, figures, monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: seen.append(figure))
    tables.write_csv(tmp_path / "curve.csv", curves())
    assert plot.active_vocabulary(tmp_path / "curve.csv") == f"{tmp_path}/curve.png"
    (axis,) = seen[0].axes
    *lines, products = axis.lines
    assert [x.get_linestyle() for x in lines] == ["--", "-"]
    assert lines[0].get_color() == lines[1].get_color()
    for drawn, shift in zip(lines, (0.1, 0.0), strict=True):
        assert list(drawn.get_xdata()) == [0, 2e-5, 9e-4, 2e-3, 2e-3]
        assert drawn.get_ydata() - shift == pytest.approx([0.2, 0.7, 0.6, 0.3, 0.3])
    assert list(products.get_ydata()) == [1, 1]
    assert axis.collections[0].get_paths()[0].vertices.max(0) == pytest.approx([1e-3, 0.8])
    assert [x.get_text() for x in axis.texts] == ["1e-06", "1e-05", "0.0001", "0.001"]
    labels = [text.get_text() for text in seen[0].legends[0].get_texts()]
    assert labels[:2] == ["4-1, before training", "4-1, after training"]
