"""The curve of ``grad_threshold``: errors and shares counted by hand, and a run from end to end."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support import tiny

pytest.importorskip("transformers")
from benchmarks import active_vocabulary as bench  # noqa: E402
from benchmarks.support import environment, plot, tables, timing  # noqa: E402
from benchmarks.support.shapes import Inputs  # noqa: E402
from lens_kernels import LensHead, LensNorm, cli  # noqa: E402
from lens_kernels.hf.model.loading import load_model  # noqa: E402

pytestmark = pytest.mark.hf
WORDS = ["a cat sat", "the dog ran off", "no", "an old hat", "we sing at noon", "fish swim", "up"]
COUNTED = sum(len(word) + 1 for word in WORDS)  # every letter of a response, and its end
BLOCKS, STUDENT_LAYERS, TEACHER_LAYERS = [1, 3, 4], [1, 2], [2, 3]
N, V, D = 24, 600, 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a teacher, data, and a student that was trained."""
    folder = tmp_path_factory.mktemp("files")
    tiny.model(seed=2).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    rows = [{"prompt": word, "completion": word[::-1]} for word in WORDS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "student": str(folder / "teacher"),
        "teacher": str(folder / "teacher"),
        "train": str(folder / "data.jsonl"),
        "output_dir": str(folder / "trained"),
        "student_blocks": BLOCKS,
        "student_layers": STUDENT_LAYERS,
        "teacher_layers": TEACHER_LAYERS,
        "max_steps": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }
    (folder / "run.yaml").write_text(json.dumps(given))  # JSON is YAML
    assert cli.main(["train", "--config", str(folder / "run.yaml")]) == 0
    return folder


def run(files, out, *options, trained=("trained",)):
    folders = [str(files / name) for name in trained]
    models = ["--teacher", str(files / "teacher"), "--trained", *folders]
    sizes = ["--data", str(files / "data.jsonl"), "--tokens", "20", "--rounds", "1"]
    sizes += ["--thresholds", "0", "1e-3", "--out", str(out)]
    bench.main([*models, *sizes, *options])
    return tables.read_csv(out / "active_vocabulary.csv")


def states(rows):
    return [*dict.fromkeys((row["run"], row["state"], row["group"]) for row in rows)]


def test_a_run_from_end_to_end_and_once_more(files, tmp_path, figures, clock, capsys, monkeypatch):
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
    # The clock adds a second with each call: 4 to warm up, then two rounds of 4, each rotated.
    columns = ("ratio_to_floor", "min_ratio_to_floor", "max_ratio_to_floor", "median_ms")
    found = [" ".join(row[name] for name in columns).strip() for row in rows[:5]]
    assert found == [
        "1.000 1.000 1.000 9500.00",
        "",
        "0.858 0.625 1.091 8500.00",  # the ratio of the medians would be 0.895
        "0.784 0.750 0.818 7500.00",
        "0.892 0.875 0.909 8500.00",
    ]
    assert figure.stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "trained before, lens, both errors below" in printed and "bf16_rounding" in printed
    assert "trained after, lens, both errors below" in printed
    # All is there already; nothing is measured or changed.
    monkeypatch.setattr(bench, "measure", None)
    assert run(files, tmp_path, *options) == rows
    assert "trained after: is there already" in capsys.readouterr().out


@pytest.mark.parametrize("group", bench.GROUPS)
def test_what_is_timed_is_loss_and_backward_of_the_group(monkeypatch, group):
    asked, floors, inner = [], [], bench.symmetric_lens_loss

    def loss(*args, **options):
        asked.append((options["grad_threshold"], options["divergence"], len(args[0])))
        return inner(*args, **options)

    monkeypatch.setattr(bench, "symmetric_lens_loss", loss)
    monkeypatch.setattr(bench.products, "products", floors.append)
    assert bench.threshold_of("bf16") == "bf16"  # names are for the library to know
    chosen = problem(group)
    bench.timed(chosen, [1e-5], 2)
    expected = (bench.GROUPS[group], 2 if group == "lens" else 1)
    assert asked.count((None, *expected)) == asked.count((1e-5, *expected)) == 3
    assert floors == [chosen.inputs] * 3


def problem(group="lens"):
    """Peaked models, most of whose vocabulary gets almost no gradient; head rows share a mean."""
    students = [torch.randn(N, D, requires_grad=True) for _ in range(2 if group == "lens" else 1)]
    teachers = [x.detach() + 0.3 * torch.randn(N, D) for x in students]
    head = (2.0 * torch.randn(V, D) + 3.0).requires_grad_()
    norm = LensNorm("rms", 1 + 0.2 * torch.randn(D), eps=0.1) if group == "lens" else None
    heads = LensHead(head, norm=norm), LensHead(head.detach().clone(), norm=norm)
    inputs = Inputs(students, teachers, head, heads[1].weight)
    return bench.Group(inputs, heads, bench.GROUPS[group])


def normed(x, head):
    if head.norm is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * head.norm.weight.double()


def by_hand(group, threshold):
    """Return errors of hidden states and head, and the shares used and dropped, all dense."""
    head, teacher_head = group.heads
    weight, their_weight = head.weight.detach().double(), teacher_head.weight.double()
    hidden_errors, exact_head, near_head = [], 0.0, 0.0
    columns, mass, used_mass = 0, 0.0, 0.0
    inputs = group.inputs
    for student, teacher in zip(inputs.student_hidden, inputs.teacher_hidden, strict=True):
        x = student.detach().double().requires_grad_()
        factor = normed(x, head)
        z = (factor @ weight.T).detach().requires_grad_()
        p = (normed(teacher.double(), teacher_head) @ their_weight.T).softmax(-1)
        q = z.softmax(-1)
        m = (p + q) / 2
        jsd = (p * (p / m).log() + q * (q / m).log()).sum() / 2
        loss = jsd if group.divergence == "jsd" else (p * (p / q).log()).sum()
        g = torch.autograd.grad(loss, z)[0]
        used = g.abs().amax(0) > threshold
        d_factor = g[:, used] @ weight[used]
        if not used.all():
            d_factor += torch.outer(g[:, ~used].sum(1), weight[~used].mean(0))
        exact, near = (
            torch.autograd.grad(factor, x, grad, retain_graph=True)[0]
            for grad in (g @ weight, d_factor)
        )
        hidden_errors.append(((near - exact).norm() / exact.norm()).item())
        exact_head = exact_head + g.T @ factor.detach()
        near_head = near_head + (g * used).T @ factor.detach()
        columns += int(used.sum())
        mass, used_mass = mass + g.abs().sum(), used_mass + (g * used).abs().sum()
    head_error = ((near_head - exact_head).norm() / exact_head.norm()).item()
    share = columns / V / len(hidden_errors)
    return hidden_errors, head_error, share, 1 - (used_mass / mass).item()


@pytest.mark.parametrize("group", bench.GROUPS)
def test_errors_and_shares_are_those_of_a_dense_gradient(always_active, group):
    chosen = problem(group)
    thresholds = [1e-5, 1e-4, 1e-3]
    rows = bench.judge(chosen, thresholds)
    for threshold in thresholds:
        hidden, head, share, dropped = by_hand(chosen, threshold)
        row = {name: float(value) for name, value in rows[str(threshold)].items()}
        assert 0.02 < share < 0.9 and dropped > 1e-5
        assert row["used_share"] == pytest.approx(share, rel=1e-4)
        assert row["dropped_share"] == pytest.approx(dropped, rel=1e-2)
        assert row["hidden_error"] == pytest.approx(max(hidden), rel=2e-2)
        assert row["head_error"] == pytest.approx(head, rel=2e-2)


def test_the_yardstick_is_the_pair_that_rounding_harms_least():
    chosen = problem()
    *_, head = exact = chosen.gradients(None)
    found = [((g.bfloat16().double() - g).norm() / g.norm()).item() for g in exact]
    assert bench.errors([4 * head], [head]) == pytest.approx([3.0])  # of the exact one's norm
    row = bench.judge(chosen, [])["bf16_rounding"]
    assert found[0] != found[1]
    assert float(row["hidden_error"]) == pytest.approx(min(found[:2]), rel=5e-3)
    assert float(row["head_error"]) == pytest.approx(found[2], rel=5e-3)


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    monkeypatch.setattr(timing, "time_interleaved", None)
    chosen = problem()
    with pytest.raises(RuntimeError, match="1000.0 gives the gradient of the hidden state 0 a rel"):
        bench.measure(chosen, [1e3], 1, {})
    chosen.inputs.student_hidden[1].data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="1e-05 .* state 1 .* error of nan, .* look for NaN in"):
        bench.measure(chosen, [1e-5], 1, {})
    values = iter([[0.0, 0.0], [0.0, 0.2]])
    monkeypatch.setattr(bench, "errors", lambda found, exact: next(values))
    with pytest.raises(RuntimeError, match="of the head a relative error of 0.2, .* above 0.1 is"):
        bench.measure(problem("final"), [1e-5], 1, {})


def counted_rows(model, layers, batch):
    """Return rows of Hugging Face's own hidden states where the next position has a label."""
    labels = batch["labels"].tolist()
    at = [(i, j - 1) for i, row in enumerate(labels) for j, x in enumerate(row) if j and x != -100]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        every = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    return [torch.stack([every[depth][i, j] for i, j in at]) for depth in (*layers, -1)]


@pytest.mark.parametrize("state", ["before", "after"])
def test_states_are_the_cut_teacher_and_the_trained_folder(files, state):
    (trained,) = bench.read_trained([files / "trained"])
    tokenizer = bench.load_tokenizer(str(files / "teacher"))
    chosen = trained.examples(files / "data.jsonl", tokenizer, 20)
    assert len(chosen) == 2  # 10 and 16 letters and ends
    batch = bench.Collator(1)(chosen)
    teacher, student = (load_model(str(files / "teacher"), "float32") for _ in range(2))
    groups = bench.groups_of(trained, state, teacher, batch, 20)
    student.model.layers = nn.ModuleList(student.model.layers[i - 1] for i in BLOCKS)
    student.config.num_hidden_layers = len(BLOCKS)
    cut = counted_rows(student, STUDENT_LAYERS, batch)
    if state == "after":
        student = load_model(str(files / "trained"), "float32")
        assert (counted_rows(student, STUDENT_LAYERS, batch)[-1] - cut[-1]).abs().max() > 1e-3
    mine = counted_rows(student, STUDENT_LAYERS, batch)
    theirs = counted_rows(teacher, TEACHER_LAYERS, batch)
    for name, part in (("lens", slice(2)), ("final", slice(2, 3))):
        inputs, heads = groups[name].inputs, groups[name].heads
        found = [*inputs.student_hidden, *inputs.teacher_hidden]
        for a, b in zip(found, [*mine[part], *theirs[part]], strict=True):
            assert a.shape == (20, 16)
            assert (a - b[:20]).abs().max() <= 1e-5 * b.abs().max()
        assert all((head.norm is None) == (name == "final") for head in heads)
        own = inputs.student_head, inputs.teacher_head
        for head, weight, model in zip(heads, own, (student, teacher), strict=True):
            assert torch.equal(head.weight, model.lm_head.weight)
            assert torch.equal(head.weight, weight)


def test_runs_that_began_alike_share_the_state_before(files, tmp_path):
    for name in ("alike", "other"):
        shutil.copytree(files / "trained", files / name)
    record = files / "other" / "run.yaml"
    record.write_text(record.read_text().replace("max_steps: 2", "max_steps: 2\nmax_length: 20"))
    rows = run(files, tmp_path, trained=("trained", "alike", "other"))
    found = [" ".join(x[:2]) for x in states(rows) if x[2] == "lens"]
    assert found == [
        "trained before",
        "trained after",
        "alike after",
        "other before",
        "other after",
    ]


def test_too_few_rows_are_found_before_any_model_is_read(files, tmp_path, monkeypatch):
    assert len(run(files, tmp_path / "all", "--tokens", str(COUNTED))) == 20
    (trained,) = bench.read_trained([files / "trained"])
    with monkeypatch.context() as patch:  # no position comes before the first label
        data = SimpleNamespace(examples=[{"labels": [5, -100, 6, 7]}])
        patch.setattr(bench, "load_examples", lambda *args, **options: data)
        with pytest.raises(ValueError, match="--tokens 3 is more than the 2 positions"):
            trained.examples(files / "data.jsonl", None, 3)
    monkeypatch.setattr(bench, "load_model", None)
    message = f"--tokens {COUNTED + 1} is more than the {COUNTED} positions with a label"
    with pytest.raises(ValueError, match=f"{message} .*: pass --tokens {COUNTED}, or more data"):
        run(files, tmp_path, "--tokens", str(COUNTED + 1))


def test_folders_that_are_no_runs_or_not_cut_or_namesakes_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="holds no run.yaml: give a folder that lens-kernels"):
        run(files, tmp_path, trained=("teacher",))
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "run.yaml").write_text("student: a\nteacher: a\ntrain: b\noutput_dir: c\n")
    with pytest.raises(ValueError, match="has no student_blocks, .* give a run that cut its st"):
        bench.read_trained([whole])
    with pytest.raises(ValueError, match=r"--trained names \['trained', 'trained'\], .* its own"):
        run(files, tmp_path, trained=("trained", "trained"))


def test_results_measured_otherwise_are_not_added_to(files, tmp_path, monkeypatch):
    run(files, tmp_path)
    before = (tmp_path / "active_vocabulary.csv").read_text()
    with pytest.raises(RuntimeError, match="with tokens '20', and this run has '21'; move the"):
        run(files, tmp_path, "--tokens", "21")
    monkeypatch.setattr(environment, "commit", lambda: "another")
    with pytest.raises(RuntimeError, match="with commit .*'another'; move the file away, or pass"):
        run(files, tmp_path)
    assert (tmp_path / "active_vocabulary.csv").read_text() == before


def test_work_that_was_stopped_keeps_what_it_has_and_goes_on(files, tmp_path, monkeypatch):
    calls, inner = [], bench.measure

    def measure(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path)
    before = tables.read_csv(tmp_path / "active_vocabulary.csv")
    assert len(states(before)) == 3
    after = run(files, tmp_path)
    assert len(calls) == 5 and after[: len(before)] == before and len(states(after)) == 4
    run(files, tmp_path, "--thresholds", "1e-4")  # another one: all is measured anew
    assert len(calls) == 9


def curves():
    """Return rows as in the CSV of two states, whose quickest threshold has too large an error."""
    values = [
        ("floor", "", "", "", 1.0),
        ("exact", "1", "0", "0", 0.2),
        ("1e-05", "0.1", "9e-4", "2e-4", 0.6),
        ("1e-06", "0.2", "1e-5", "2e-5", 0.7),
        ("0.0001", "0.1", "1e-5", "2e-3", 0.3),
        ("0.001", "0.1", "2e-3", "2e-5", 0.3),
    ]
    columns = ("threshold", "used_share", "hidden_error", "head_error", "ratio_to_floor")
    more = dict.fromkeys(("tokens", "vocab_entries", "student_width", "teacher_width"), "8")
    more |= {"run": "4-1", "device": "a machine", "rounds": "3", "pairs": "2"}
    return [
        dict(zip(columns, (*value[:-1], f"{value[-1] + shift + slow:g}"), strict=True))
        | {"state": state, "group": group, **more}
        for state, shift in (("before", 0.1), ("after", 0.0))
        for group, slow in (("lens", 0.0), ("final", 1.0))
        for value in values
    ]


def test_the_verdict_is_the_quickest_threshold_whose_errors_are_both_small():
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
