"""Parts of the lens study, and a slow test that the lens improves distillation."""

import ast
import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

from benchmarks import lens_study
from benchmarks.study import data, groups, judge, models, report, runs, statistics
from benchmarks.study.settings import PRETRAINED_PAIRS, UNIFORM, Run, TeacherSettings
from benchmarks.support import tables
from lens_kernels import pictures

TINY = Run(teacher=TeacherSettings(text="topics", steps=2), steps=2, batch=2)


def result(run, kl, curve=None, cpu_ms=100.0):
    """Return a made-up result for a run of the study."""
    row = {name: str(kl) for name in runs.METRICS} | {"key": run.key, "curve": json.dumps(curve)}
    depths = [{"depth": 1.0, "entropy_student": 1.0, "entropy_teacher": 2.0}]
    depths[0] |= {"kl": 0.1, "reverse_kl": 0.2, "overconfident": 0.5}
    row |= {"by_depth": json.dumps(depths), "cpu_ms_per_step": str(cpu_ms), "seconds": "1.5"}
    return {name: row.get(name, "-") for name in runs.COLUMNS}


def test_key_changes_with_the_settings_of_a_run():
    assert Run().key == Run().key
    changed = [replace(Run(), seed=1), replace(Run(), rate=1e-3), Run(lens="jsd", pairs=UNIFORM)]
    changed.append(Run(teacher=TeacherSettings(seed=1)))
    assert len({run.key for run in [Run(), *changed]}) == 5


def run_of(row):
    """Return the run of a line of the CSV."""
    values = {}
    for name in runs.SETTINGS:
        default = getattr(Run(), name)
        if isinstance(default, str):
            values[name] = row[name]
        elif isinstance(default, TeacherSettings):
            values[name] = TeacherSettings(**json.loads(row[name]))
        elif isinstance(default, tuple):
            lists = json.loads(row[name])
            values[name] = tuple(tuple(x) if isinstance(x, list) else x for x in lists)
        else:
            values[name] = type(default)(ast.literal_eval(row[name]))
    return Run(**values)


def test_a_new_setting_changes_no_key_of_the_published_results():
    published = runs.rows(report.CSV)
    assert len(published) > 100
    assert [run_of(row).key for row in published] == [row["key"] for row in published]
    assert len({(row["device"], row["key"]) for row in published}) == len(published)


@pytest.mark.parametrize(
    "settings",
    [{"coeff": 2.0}, {"norm": False}, {"standardize": True}, {"lens": "jsd"}, {"pairs": UNIFORM}],
)
def test_settings_without_an_effect_are_refused(settings):
    with pytest.raises(ValueError, match="lens"):
        Run(**settings)


def test_training_settings_of_a_pretrained_teacher_are_refused():
    with pytest.raises(ValueError, match="pretrained"):
        TeacherSettings(pretrained=True, steps=10)


@pytest.mark.parametrize("group", [*groups.GROUPS.values(), groups.quick()], ids=lambda x: x.name)
def test_every_arm_has_its_own_runs_and_a_baseline_in_its_group(group):
    labels = [arm.label for arm in group.arms]
    assert len(set(labels)) == len(labels)
    assert len({run.key for run in group.runs()}) == len(labels) * len(group.seeds)
    assert {arm.versus for arm in group.arms} <= {None, *labels}


def test_no_two_curves_of_a_figure_look_alike():
    looks = len({*report.figures.ARMS}) * len({*report.figures.LINES})
    assert looks >= max(len(group.arms) for group in groups.GROUPS.values())


def test_sweep_and_comparisons_use_different_seeds():
    names = ("rate", "main", "second", "third")
    used = [seed for name in names for seed in groups.GROUPS[name].seeds]
    assert len(set(used)) == len(used) == 21


def test_held_out_documents_are_not_trained_on(tmp_path):
    settings = TeacherSettings(text="topics")
    text = data.load(settings, tmp_path)
    assert text.held_out.shape == (data.HELD_OUT_ROWS, data.ROW)
    trained = {tuple(row) for row in text.train.tolist()}
    assert len(trained) > 800
    assert not trained & {tuple(row) for row in text.held_out.tolist()}
    # The second call reads the file that the first call saved.
    assert torch.equal(text.train, data.load(settings, tmp_path).train)


def watch_steps(monkeypatch, look):
    """Return a list that gets ``look(trainer, loss)`` at each step of a training."""
    seen = []
    compare = models.LensDistillTrainer.compute_loss

    def watched(trainer, *args, **kwargs):
        loss = compare(trainer, *args, **kwargs)
        seen.append(look(trainer, loss))
        return loss

    monkeypatch.setattr(models.LensDistillTrainer, "compute_loss", watched)
    return seen


def test_runs_of_one_seed_share_initial_weights_and_data_order(tmp_path, monkeypatch):
    seen, starts, ends = {}, {}, {}
    rows = torch.arange(64 * 8).view(64, 8) % data.VOCABULARY
    teacher = models.new_model(6, 128).eval()
    collate = models.default_data_collator
    arms = {
        "ce": replace(TINY, final=""),
        "kd": TINY,
        "lens": replace(TINY, lens="jsd", pairs=UNIFORM),
        "ce, lens": replace(TINY, final="", lens="jsd", pairs=UNIFORM),
        "mse": replace(TINY, mse=0.1, pairs=UNIFORM),
        "other seed": replace(TINY, seed=1),
    }
    for name, run in arms.items():
        order = seen.setdefault(name, [])
        watched = lambda x, o=order: o.extend(y["input_ids"] for y in x) or collate(x)  # noqa: E731
        monkeypatch.setattr(models, "default_data_collator", watched)
        student = models.new_student(run, teacher)
        starts[name] = student.lm_head.weight.detach().clone()
        models.train(student, teacher, run, rows, tmp_path)
        ends[name] = student.lm_head.weight.detach()
    orders = {name: torch.stack(order) for name, order in seen.items()}
    assert len({tuple(x.flatten().tolist()) for x in ends.values()}) == len(arms)
    for name in ("ce", "lens", "ce, lens", "mse"):
        assert torch.equal(starts[name], starts["kd"])
        assert torch.equal(orders[name], orders["kd"])
    assert not torch.equal(starts["other seed"], starts["kd"])
    assert not torch.equal(orders["other seed"], orders["kd"])


def test_cache_of_the_pretrained_group_changes_no_weight(tmp_path):
    rows = torch.arange(8 * 8).view(8, 8) % data.VOCABULARY
    torch.manual_seed(0)
    teacher = models.new_model(30, 32).eval()
    cached = replace(TINY, teacher=TeacherSettings(pretrained=True), depth=20, width=32)
    for lens in ({}, {"lens": "jsd", "pairs": PRETRAINED_PAIRS}):
        weights = []
        for run in (cached, replace(cached, teacher=TINY.teacher)):
            student = models.new_student(run, teacher)
            models.train(student, teacher, replace(run, **lens), rows, tmp_path)
            weights.append(torch.cat([x.flatten() for x in student.parameters()]))
        torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    # Runs with and without a lens share it: a cache of other layers would be refused.
    assert (tmp_path / "teacher_cache" / "train").is_dir()


@pytest.mark.parametrize("extra", [{"lens": "jsd", "coeff": 4.0}, {"mse": 300.0}])
def test_cross_entropy_takes_a_lens_with_the_same_weight(tmp_path, monkeypatch, extra):
    losses = watch_steps(monkeypatch, lambda trainer, loss: loss.item())
    rows = torch.arange(16 * 8).view(16, 8) % data.VOCABULARY
    torch.manual_seed(0)
    teacher = models.new_model(6, 128).eval()
    teacher.lm_head.weight.data *= 30  # with small logits, the lenses would agree
    for final in ("forward_kl", ""):
        for options in ({}, {"pairs": UNIFORM, **extra}):
            run = replace(TINY, final=final, steps=1, **options)
            models.train(models.new_student(run, teacher), teacher, run, rows, tmp_path)
    kl, kl_lens, ce, ce_lens = losses
    assert abs(ce - kl) > 0.1 and kl_lens - kl > 0.1
    assert ce_lens - ce == pytest.approx(kl_lens - kl, rel=1e-4)


def test_lens_weight_follows_its_schedule(tmp_path, monkeypatch):
    weights = watch_steps(monkeypatch, lambda x, loss: x.lens_objective.options.lens_coeff)
    rows = torch.zeros(16, 8, dtype=torch.long)
    teacher = models.new_model(6, 128).eval()
    for decay in ("linear", "first half"):
        run = replace(TINY, lens="jsd", pairs=UNIFORM, coeff=4.0, decay=decay, steps=4)
        models.train(models.new_student(run, teacher), teacher, run, rows, tmp_path)
    assert weights == [4.0, 3.0, 2.0, 1.0, 4.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(("warmup", "expected"), [(0, [0.0, 0.5, 1.0]), (4, [0.0, 0.25, 0.5])])
def test_learning_rate_rises_during_the_warmup(tmp_path, monkeypatch, warmup, expected):
    rates = watch_steps(monkeypatch, lambda trainer, loss: trainer.lr_scheduler.get_last_lr()[0])
    rows = torch.zeros(64, 8, dtype=torch.long)
    run = replace(TINY, steps=24, warmup=warmup)
    teacher = models.new_model(6, 128).eval()
    models.train(models.new_student(run, teacher), teacher, run, rows, tmp_path)
    assert rates[:3] == pytest.approx([run.rate * share for share in expected])


def test_judge_finds_no_difference_between_a_teacher_and_itself():
    torch.manual_seed(0)
    teacher = models.new_model(2, 32).eval()
    rows = torch.randint(data.VOCABULARY, (3, data.ROW))
    judged = judge.Judge.of(teacher, rows)
    final = judged.final(teacher)
    assert final["kl"] == pytest.approx(0.0, abs=1e-6)
    assert final["agreement"] == 1.0 and final["overconfident"] == 0.0
    assert final["greedy_prefix"] == judge.CONTINUED
    other = models.new_model(2, 32).eval()
    assert judged.forward_kl(other) == pytest.approx(judged.final(other)["kl"]) != 0.0
    last = judged.by_depth(other)[-1]
    assert last["kl"] == pytest.approx(judged.final(other)["kl"], rel=1e-4)


def test_calibration_error_matches_a_computation_by_hand():
    confidence, hit = torch.tensor([0.9, 0.9, 0.3, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = (abs(1.8 - 1.0) + 0.3 + 0.0) / 4
    assert judge._calibration_error(confidence, hit) == pytest.approx(expected)


class Pool:
    """Stands in for a process pool: runs each function at once, in this process."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        future = runs.Future()
        try:
            future.set_result(function(*args))
        except ArithmeticError as error:
            future.set_exception(error)
        return future


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runs, "_make_teacher", lambda *args: None)
    monkeypatch.setattr(runs, "one", lambda run, *args: result(run, 0.5) | {"seconds": 2.0})
    wanted = [Run(seed=seed) for seed in (1, 2, 2)]
    runs.do(wanted[:1], tmp_path, 1, 1, False)
    before = (tmp_path / "runs.csv").read_text()
    runs.do(wanted, tmp_path, 1, 1, False)
    after = (tmp_path / "runs.csv").read_text()
    assert after.startswith(before)
    assert [*runs.read(tmp_path / "runs.csv")] == [run.key for run in wanted[:2]]
    runs.do(wanted, tmp_path, 1, 1, False)
    assert (tmp_path / "runs.csv").read_text() == after


def test_results_older_than_a_setting_are_resumed_with_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runs, "_make_teacher", lambda *args: None)
    monkeypatch.setattr(runs, "one", lambda run, *args: result(run, 0.5) | {"seconds": 2.0})
    path = tmp_path / "runs.csv"
    old = result(Run(seed=1), 0.25)
    del old["standardize"]
    tables.append_csv(path, old)
    runs.do([Run(seed=1), Run(seed=2)], tmp_path, 1, 1, False)
    first, second = runs.read(path).values()
    assert (first["kl"], first["standardize"], first["python"]) == ("0.25", "False", "-")
    assert (second["kl"], second["seed"]) == ("0.5", "-")
    assert [*tables.read_csv(path)[1]] == runs.COLUMNS


def test_standardised_logits_of_the_lens_reach_the_trainer(tmp_path):
    rows = torch.arange(16 * 8).view(16, 8) % data.VOCABULARY
    teacher = models.new_model(6, 128).eval()
    heads = []
    for standardize in (False, True):
        run = replace(TINY, lens="jsd", pairs=UNIFORM, standardize=standardize)
        student = models.new_student(run, teacher)
        models.train(student, teacher, run, rows, tmp_path)
        heads.append(student.lm_head.weight)
    assert not torch.equal(*heads)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def one(run, *args):
        if run.seed == 1:
            raise ArithmeticError("broken")
        return result(run, 0.5) | {"seconds": 2.0}

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runs, "_make_teacher", lambda *args: None)
    monkeypatch.setattr(runs, "one", one)
    with pytest.raises(RuntimeError, match="1 of 2"):
        runs.do([Run(seed=1), Run(seed=2)], tmp_path, 1, 1, False)
    assert [*runs.read(tmp_path / "runs.csv")] == [Run(seed=2).key]
    assert "broken" in capsys.readouterr().out


def test_differences_match_computations_by_hand():
    gap = statistics.difference([-1.0, -2.0, -3.0])
    assert gap.mean == -2.0
    assert gap.student_t == pytest.approx((-2 - 4.303 / 3**0.5, -2 + 4.303 / 3**0.5))
    assert -3.0 <= gap.bootstrap[0] < -2.0 < gap.bootstrap[1] <= -1.0
    assert gap.verdict == "within the noise"
    assert statistics.difference([-1.0, -1.1, -1.2]).verdict == "lower"
    assert statistics.difference([1.0, 1.1, 1.2]).verdict == "higher"
    assert statistics.difference([1.0]).verdict == "one seed"


def main_results(seeds=(1, 2, 3)):
    """Return results of the main group in which the JSD lens lowers KL by 10 %.

    The lens makes a run 50 % longer.
    """
    results = {}
    for arm in groups.GROUPS["main"].arms:
        for seed in seeds:
            run = replace(arm.run, seed=seed)
            better = 0.9 if run.lens == "jsd" else 1.0
            kl = (0.3 + 0.01 * seed) * better
            curve = {300: 2 * kl, 600: kl}
            results[run.key] = result(run, kl, curve, 150.0 if run.lens else 100.0)
    return results


def test_comparisons_are_paired_by_seed():
    results = main_results()
    found = {x.arm.label: x for x in statistics.compare(groups.GROUPS["main"], results)}
    lens = found["forward KL + JSD lens"]
    # Losses differ between seeds, but for each seed the lens lowers KL by 10 %.
    assert lens.percent.mean == pytest.approx(-10)
    assert lens.percent.student_t == pytest.approx((-10, -10))
    assert lens.percent.verdict == "lower"
    # In the second half of training, the KL of the lens falls from 1.8 to 0.9 times the baseline's
    # final KL. So it reaches that final KL after 8/9 of this half.
    assert lens.reached == pytest.approx(0.5 + 0.5 * 8 / 9)
    assert lens.cost == 1.5
    assert found["forward KL"].percent is None
    assert found["cross entropy"].percent.mean == pytest.approx(0)


def test_a_group_is_compared_over_the_seeds_that_all_its_objectives_have():
    group = groups.GROUPS["coefficient"]
    base, few, many, *_ = group.arms
    # Seed 2 is easier than seed 1. So means over other seeds than the baseline's would mislead.
    kls = {(base, 1): 1.0, (base, 2): 0.5, (many, 1): 0.9, (many, 2): 0.45, (few, 1): 0.8}
    runs_of = {key: replace(key[0].run, seed=key[1]) for key in kls}
    results = {run.key: result(run, kls[key], {600: kls[key]}) for key, run in runs_of.items()}
    found = {x.arm.label: x for x in statistics.compare(group, results)}
    assert {label: (x.seeds, x.mean) for label, x in found.items()} == {
        base.label: ((1,), 1.0),
        few.label: ((1,), 0.8),
        many.label: ((1,), 0.9),
    }
    del results[runs_of[few, 1].key]
    assert {x.seeds for x in statistics.compare(group, results)} == {(1, 2)}


def test_table_of_lenses_has_the_means_of_the_finished_seeds():
    group, results = groups.GROUPS["pretrained"], {}
    for seed, kl in ((1, 0.2), (2, 0.4)):
        run = replace(group.arms[1].run, seed=seed)
        depths = [{"depth": float(i), "kl": i * kl} for i in range(1, 21)]
        results[run.key] = result(run, kl) | {"by_depth": json.dumps(depths)}
    *_, line = report.lenses(group, results, (7, 20)).splitlines()
    assert line == "| forward KL + JSD lens | 2.100 | 6.000 |"


def test_worse_arm_never_reaches_the_baseline():
    own, base = ({"curve": json.dumps({1: 2.0, 2: x})} for x in (1.5, 1.0))
    assert statistics._share_to_reach([(own, base)]) is None


@pytest.mark.parametrize(("high", "label"), [(1.5, "0.8"), (30.0, "")])
def test_a_narrow_logarithmic_axis_labels_all_its_ticks(figures, high, label):
    figure = pictures.canvas(4, 3)
    axes = figure.subplots()
    axes.plot([0, 1], [0.7, high])
    pictures.log_axis(axes)
    figure.canvas.draw()
    texts = [x.get_text() for x in axes.yaxis.get_ticklabels(minor=True)]
    assert label in texts and (label or not any(texts))


def test_publish_writes_page_and_figures_from_the_results(tmp_path, figures):
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    page.write_text(report.PAGE.read_text())
    results = [*main_results().values()]
    halves = [tmp_path / "runs.csv", tmp_path / "others.csv"]
    for number, row in enumerate(results):
        runs.append(halves[number % 2], row)
    report.publish(halves, page, tmp_path / "kept.csv", tmp_path / "figures")
    text = page.read_text()
    assert "| forward KL + JSD lens | 3 | 0.2880 ± 0.0090 | forward KL | -10.00 |" in text
    assert "](../figures/study_main.svg)" in text
    for name in ("study_main", "study_depth", "study_penalties"):
        for kind in ("svg", "png"):
            assert (tmp_path / "figures" / f"{name}.{kind}").stat().st_size > 1000
    kept = runs.read(tmp_path / "kept.csv")
    assert kept == {row["key"]: row for row in results}
    once = text
    report.publish([tmp_path / "kept.csv"], page, tmp_path / "kept.csv", tmp_path / "figures")
    assert page.read_text() == once


def test_a_table_has_the_runs_of_one_machine(tmp_path, figures):
    page, kept = tmp_path / "study.md", tmp_path / "runs.csv"
    page.write_text(report.PAGE.read_text())
    for row in main_results().values():
        runs.append(kept, row | {"device": "one"})
    for row in main_results((1, 2)).values():
        kl = str(1.02 * float(row["kl"]))
        runs.append(kept, row | {"device": "other", "kl": kl})
    third = [*groups.GROUPS["third"].runs()][:4]
    for number, run in enumerate(third):
        kl = (0.5, 0.25)[number // 2]
        runs.append(kept, result(run, kl, {600: kl}) | {"device": "other"})
    for run in third[:2]:
        runs.append(kept, result(run, 0.4, {600: 0.4}) | {"device": "one"})
    for _ in range(2):  # the CSV that is written gives the same page
        report.publish([kept], page, kept, tmp_path / "figures")
        parts = page.read_text().split("<!-- ")
        found = {x.partition(" -->")[0]: x for x in parts}
        assert "| forward KL | 3 | 0.3200 ± 0.0100 |" in found["main"]
        assert "| forward KL | 2 | 0.3213 ± 0.0072 |" in found["again"]
        assert "12 runs" in found["rounding"] and "differ by 2.0 % in" in found["rounding"]
        assert "| forward KL | 2 | 0.3750 ± 0.1768 |" in found["third"]
        assert "Machine: one." in found["main"] and "Machine: other." in found["third"]
    assert (tmp_path / "figures" / "study_again.svg").exists()


@pytest.mark.slow
def test_distillation_improves_on_fine_tuning_and_the_lens_on_distillation(tmp_path, capsys):
    """The test's KL shares no code with the loss, so it would reveal a lens without effect."""
    lens_study.main(["--quick", "--jobs", "1", "--out", str(tmp_path)])
    found = runs.read(tmp_path / "runs.csv")
    kd, lens, sft = (found[run.key] for run in groups.quick().runs())
    assert float(kd["kl"]) < 0.85 * float(sft["kl"])
    assert float(lens["kl"]) < 0.97 * float(kd["kl"])
    pairs = zip(*(json.loads(row["by_depth"])[:2] for row in (lens, kd)), strict=True)
    for with_lens, without in pairs:
        assert with_lens["jsd"] < 0.85 * without["jsd"]
