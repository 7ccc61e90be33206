"""The benchmarks measure what they say: the trackers, the contenders, and a run from end to end."""

import csv
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks import memory, memory_vs_vocab, providers, speed_vs_floor
from lens_kernels import symmetric_lens_loss

CPU = torch.device("cpu")
MIB = memory.MIB
SLACK = MIB // 32  # scalars, and what PyTorch allocates the first time it does something


def watched(function):
    """What both instruments say of a real run on a CPU."""
    return memory.measure(function, CPU), memory.track(function)


def allocations():
    """Peak 12 MiB, of which 4 MiB stay."""
    a = torch.empty(1024, 1024)  # 4 MiB
    b = a + 1  # 8
    del a  # 4
    view = b.view(-1, 2)
    c = b * 2  # 8
    torch.mul(c, c, out=c)
    c.mul_(2).t_()
    d = view.t().contiguous()  # 12
    del b, d, view
    return c


def test_both_instruments_count_temporaries_views_and_in_place_operators_right():
    for seen in watched(allocations):
        assert seen.peak == pytest.approx(12 * MIB, abs=SLACK)
        assert seen.kept == pytest.approx(4 * MIB, abs=SLACK)


def test_storages_from_before_count_as_nothing():
    x = torch.empty(MIB)
    for seen in watched(lambda: x.view(-1, 4).t()[0].mul_(2)):
        assert max(seen.peak, seen.kept) < SLACK
    for seen in watched(lambda: (x.add_(1), x * 2)[0]):
        assert seen.peak == pytest.approx(4 * MIB, abs=SLACK)
        assert seen.kept < SLACK


def test_both_instruments_look_into_the_custom_operator():
    """Its two tiles of logits, 16 MiB, live and die inside, beside 16 blocks of 1 MiB."""
    tokens, vocab = 256, 8192
    hidden = torch.randn(tokens, 16), torch.randn(tokens, 24)
    heads = torch.randn(vocab, 16), torch.randn(vocab, 24)

    def run():
        return symmetric_lens_loss(*hidden, *heads)

    for seen in watched(run):
        assert 16 * MIB < seen.peak < 32 * MIB + SLACK
        assert seen.kept < MIB


@pytest.fixture
def contender(request):
    found = (providers.CONTENDERS | providers.SPEED_CONTENDERS)[request.param]
    if (reason := found.objection()) is not None:
        pytest.skip(f"{found.label()}: {reason}")
    return found


# Liger's default compiles for many seconds; the scripts check it themselves before they measure.
KEYS = [key for key in providers.CONTENDERS if key != "liger"]


@pytest.mark.parametrize("contender", [*KEYS, "dense_compiled", "published"], indirect=True)
def test_contender_computes_the_loss_and_gradients_of_the_oracle(contender):
    providers.check(contender, CPU)


def test_check_refuses_a_contender_that_computes_something_else():
    def but_for_a_pair(inputs):
        return providers.dense(inputs.pairs(1))

    def scaled(inputs):
        loss = providers.dense(inputs)
        return loss + 1e-3 * (loss - loss.detach())

    def without_the_mask(inputs):
        return providers.dense(replace(inputs, mask=None))

    for wrong, message in (
        (but_for_a_pair, "no gradient 1"),
        (scaled, "gradient 0 is off"),
        (without_the_mask, r"something else: loss [\d.]+ instead of [\d.]+ \(40% masked\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            providers.check(providers.Contender("wrong", "wrong", lambda f=wrong: f), CPU)


def test_only_the_published_loss_is_let_off_by_what_its_epsilon_takes():
    """Its loss is ``1e-8 * V`` too low; as much is an error in anyone else, and more in it too."""

    def lower(inputs, by):
        return providers.dense(inputs) - by * inputs.student_head.shape[0]

    for by, epsilon, wrong in ((1e-8, 1e-8, False), (1e-8, 0.0, True), (3e-8, 1e-8, True)):
        contender = providers.Contender(
            "low", "low", lambda by=by: lambda inputs: lower(inputs, by), epsilon=epsilon
        )
        with pytest.raises(RuntimeError, match="loss") if wrong else nullcontext():
            providers.check(contender, CPU)


def test_a_mask_takes_its_share_of_tokens_and_of_the_floor():
    job = providers.Job(tokens=40, vocab=50, student_width=8, teacher_width=8, masked=0.25)
    inputs = job.make()
    assert inputs.mask.sum() == 30
    assert 0 < inputs.mask[:10].sum() < 10  # scattered
    hidden = inputs.student_hidden[0]
    assert torch.equal(inputs.counted(hidden), hidden[inputs.mask])
    unmasked = replace(job, masked=0.0)
    assert job.gemm_flops() == 0.75 * unmasked.gemm_flops()
    assert unmasked.make().mask is None
    assert torch.equal(unmasked.make().student_head, inputs.student_head)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("contender", KEYS, indirect=True)
def test_fake_tensors_tell_what_a_real_run_takes(contender, pairs):
    job = providers.Job(tokens=128, vocab=6000, pairs=pairs, student_width=64, teacher_width=96)
    fake = memory_vs_vocab.fake_memory(contender, job)
    real, _ = memory_vs_vocab.real_memory(contender, job.make(), CPU)
    assert fake.peak == pytest.approx(real.peak, rel=0.01)
    assert fake.kept == pytest.approx(real.kept, rel=0.01)


def test_fake_tensors_tell_what_the_compiled_pass_takes(monkeypatch):
    """Calls over many logits compile the pass: its stand-in over fake tensors allocates as much."""
    monkeypatch.setattr(providers.tile_pass, "CPU_COMPILE_LOGITS", 0)
    job = providers.Job(tokens=256, vocab=20000, student_width=16, teacher_width=24)
    contender = providers.CONTENDERS["lens_kernels"]
    fake = memory_vs_vocab.fake_memory(contender, job)
    real, _ = memory_vs_vocab.real_memory(contender, job.make(), CPU)
    assert fake.peak == pytest.approx(real.peak, rel=0.01)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quick(out, *contenders):
    memory_vs_vocab.main(
        ["--quick", "--device", "cpu", "--out", str(out), "--contenders", *contenders]
    )
    return read(out / "memory_vs_vocab.csv")


def test_quick_run_writes_table_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = quick(tmp_path, "lens_kernels", "dense")
    assert {(row["contender"], row["pairs"], row["vocab_entries"]) for row in rows} == {
        (contender, pairs, vocab)
        for contender in ("lens_kernels", "dense")
        for pairs in "12"
        for vocab in ("2048", "8192")
    }
    for row in rows:
        assert row["method"] == "measured"
        assert float(row["peak_with_gradients_mib"]) > float(row["gradients_mib"]) > 6
        assert float(row["fake_peak_with_gradients_mib"]) > 0
        for column in ("device", "torch", "liger_kernel", "trl", "commit", "date_utc"):
            assert column in row
    assert (tmp_path / "memory_vs_vocab.png").stat().st_size < 200_000
    assert "lens_kernels" in capsys.readouterr().out


def test_points_that_take_too_long_come_from_fake_tensors(tmp_path):
    job = providers.Job(tokens=128, vocab=8192)
    contender = providers.CONTENDERS["dense"]
    for rate, method in ((1e15, "measured"), (1.0, "fake")):
        (row,) = memory_vs_vocab.points([job], [contender], rate, gemm_seconds=1.0)
        assert row["method"] == method
        assert bool(row["note"]) == (method == "fake")


def test_absent_peers_are_listed_with_the_command_that_installs_them(tmp_path, monkeypatch, capsys):
    for module in ("liger_kernel", "trl"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = quick(tmp_path, "dense", "liger", "liger_uncompiled", "trl")
    absent = {row["contender"]: row["note"] for row in rows if row["method"] == "absent"}
    printed = capsys.readouterr().out
    assert set(absent) == {"liger", "liger_uncompiled", "trl"}
    for command in ("pip install liger-kernel==0.8.5", "pip install trl==1.16.0"):
        assert command in printed
        assert any(command in note for note in absent.values())
    assert sum(row["method"] == "measured" for row in rows) == 4


def test_a_peer_that_fails_to_load_is_listed_with_its_own_reason():
    def broken():
        raise OSError("libsomething.so is missing")

    contender = providers.Contender("broken", "broken", broken, package="torch", release="0")
    assert "libsomething.so is missing" in contender.objection()


def test_speed_benchmark_relates_every_row_to_the_floor(tmp_path):
    sizes = ["--tokens", "64", "--vocab", "2000", "--student-width", "64", "--teacher-width", "96"]
    options = ["--device", "cpu", "--rounds", "2", "--uncompiled", "--bf16"]
    speed_vs_floor.main([*sizes, *options, "--out", str(tmp_path)])
    rows = read(tmp_path / "speed_vs_floor.csv")
    assert [row["dtype"] for row in rows] == ["float32"] * 6 + ["bfloat16"] * 6
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert (row["ratio_to_floor"] == "1.00") or row["contender"] != "floor"
