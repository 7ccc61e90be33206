"""The programs that measure and test on a GPU run here on a CPU."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day, speed_gpu
from benchmarks.support import contenders, products, tables
from benchmarks.support.providers import dense
from benchmarks.support.shapes import MODELS, Job
from lens_kernels.backends.torch import layout
from tests.support import ROOT, gpu_report

VERSIONS = ("device", "driver", "cuda", "hip", "torch", "triton", "python", "commit")
CPU = ["--device", "cpu", "--tiny"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_stop_at_once_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pytest, "main", None)
    monkeypatch.setattr(speed_gpu, "gather", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    assert "this needs a GPU, but torch" in capsys.readouterr().err
    for program, shape in ((speed_gpu, ["gpt2"]), (gpu_day, [])):
        with pytest.raises(SystemExit, match="this needs a GPU, but torch"):
            program.main([*shape, "--out", str(tmp_path), "--device", "cuda"])
    assert not list(tmp_path.iterdir())


PROBE = """
import os, pytest
gpu = pytest.mark.gpu
def test_unmarked(): pass
@gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_good(backend): pass
@gpu
def test_bad(): assert 1 == 2, "one"
@gpu
def test_absent(): pytest.skip("needs 9 GiB")
@pytest.fixture
def broken(): raise OSError("two")
@gpu
def test_broken(broken): pass
@pytest.fixture
def late(): yield; raise OSError("three")
@gpu
def test_late(late): pytest.skip("early")
@gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_parity(backend): pass
@gpu
@pytest.mark.parametrize("backend", ["triton"])
def test_fatal(backend): os._exit(3)
"""


def test_the_report_has_a_row_for_every_test_in_order(tmp_path):
    """If a test ends its process, the report keeps the rows of earlier tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(PROBE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    code = (
        "import sys, pathlib; from benchmarks.support import environment\n"
        "from tests.support import gpu_report\n"
        "environment.no_gpu = lambda: None\n"
        "environment.device_name = lambda device: 'Some GPU (80 GB)'\n"
        "gpu_report.ROOT = pathlib.Path(sys.argv[1])\n"
        "more = ['-n', '1', '-p', 'no:cacheprovider', '--max-worker-restart', '0']\n"
        "sys.exit(gpu_report.main(['--out', sys.argv[1], '--', *more]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    rows = tables.read_csv(tmp_path / "tests.csv")
    assert [[row["test"].split("::")[1], row["outcome"]] for row in rows] == [
        ["test_parity[torch]", "passed"],
        ["test_good[torch]", "passed"],
        ["test_bad", "failed"],
        ["test_absent", "skipped"],
        ["test_broken", "failed"],
        ["test_late", "failed"],
        ["test_good[triton]", "passed"],
        ["test_parity[triton]", "passed"],
        ["test_fatal[triton]", "failed"],
    ]
    notes = [row["note"] for row in rows if row["outcome"] != "passed"]
    assert notes[:4] == ["AssertionError: one", "needs 9 GiB", "OSError: two", "OSError: three"]
    assert "crashed" in notes[4]
    for row in rows:
        assert float(row["seconds"]) >= 0 and set(VERSIONS) <= row.keys()
        assert row["device"] == "Some GPU (80 GB)" and row["torch"] == torch.__version__


def test_speed_gpu_runs_end_to_end(tmp_path, clock, monkeypatch):
    checked = []
    monkeypatch.setattr(contenders, "check", lambda each, device: checked.append(each.key))
    options = ["gpt2", *CPU, "--out", str(tmp_path), "--parts"]
    assert speed_gpu.main([*options, "--contenders", "triton", "torch", "dense"]) == 0
    rows = tables.read_csv(tmp_path / "speed.csv")
    assert checked == ["triton", "torch", "dense"]
    steps = [("step", key) for key in ("floor", "triton", "torch", "dense")]
    parts = [("kernels of torch", key) for key in ("products", "pass", "rest")]
    gemms = ["logits of the student", "logits of the teacher"]
    gemms += ["gradient of hidden states", "gradient of the head"]
    gemms = [("one GEMM", name) for name in gemms]
    assert [(row["part"], row["contender"]) for row in rows] == [*steps, *parts, *gemms]
    # Each call takes 1 s longer than the previous call. After 4 warm-up calls, two rounds make 4
    # calls each, in rotated order.
    columns = ("min_ms", "median_ms", "max_ms", "ratio_to_floor")
    found = [" ".join(row[name] for name in columns) for row in rows[:4]]
    assert found[1:3] == ["5000.000 8500.000 12000.000 0.89", "6000.000 7500.000 9000.000 0.79"]
    # Only steps of the library and their parts have a predicted time. It is predicted for the
    # layout of tiles on a CPU.
    predicted = [row["contender"] for row in rows if row["predicted_ms"]]
    assert predicted == ["triton", "torch", "products", "pass", "rest"]
    assert float(rows[4]["median_ms"]) > 0 and float(rows[6]["median_ms"]) > 0
    assert all(float(row["tflop_per_s"]) > 0 for row in rows[7:])
    assert rows[3]["gradients_mib"] == "0.01"
    for row in rows:
        assert set(VERSIONS) <= row.keys() and row["shape"] == "tiny"
        peak, kept = row["peak_with_gradients_mib"] or 0, row["gradients_mib"] or 0
        assert float(peak) >= float(kept)


@pytest.mark.parametrize(
    ("key", "error", "status"),
    [
        ("torch", torch.OutOfMemoryError("too much"), 1),
        ("trl", ValueError("of its own\nmore"), 0),
    ],
)
def test_what_fails_has_a_row_and_the_others_have_times(monkeypatch, tmp_path, key, error, status):
    def loss(inputs):
        raise error

    # Skip garbage collection, which is slow after many modules were loaded.
    monkeypatch.setattr(speed_gpu.gc, "collect", lambda: None)
    monkeypatch.setattr(contenders, "check", lambda each, device: None)
    every = {name: speed_gpu.CONTENDERS[name] for name in ("torch", "trl")}
    every["trl"] = replace(every["trl"], package="", load=lambda: dense)
    every[key] = replace(every[key], load=lambda: loss)
    monkeypatch.setattr(speed_gpu, "CONTENDERS", every)
    options = ["gpt2", *CPU, "--out", str(tmp_path), "--contenders", "torch", "trl"]
    monkeypatch.setattr(speed_gpu.Contender, "skip_reason", lambda self, device: None)
    assert speed_gpu.main(options) == status
    rows = tables.read_csv(tmp_path / "speed.csv")
    note = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert [row["note"] for row in rows if row["contender"] == key] == [note]
    for row in rows:
        assert bool(row["median_ms"]) == (row["contender"] != key)
    assert len(rows) == 3


def test_a_wrong_backend_is_measured_with_a_note_and_a_wrong_peer_is_not(monkeypatch, tmp_path):
    def check(contender, device):
        raise RuntimeError("wrong")

    monkeypatch.setattr(contenders, "check", check)
    options = ["gpt2", *CPU, "--out", str(tmp_path), "--contenders", "torch", "dense"]
    assert speed_gpu.main(options) == 1
    rows = [row for row in tables.read_csv(tmp_path / "speed.csv") if row["contender"] != "floor"]
    assert [(row["contender"], bool(row["median_ms"]), row["note"]) for row in rows] == [
        ("dense", False, "RuntimeError: wrong"),
        ("torch", True, "RuntimeError: wrong"),
    ]


def test_alone_beside_an_absent_peer_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(speed_gpu, "gather", None)
    options = ["llama3", *CPU, "--out", str(tmp_path), "--contenders", "liger_hopper", "torch"]
    assert speed_gpu.main(options) == speed_gpu.SKIPPED
    (row,) = tables.read_csv(tmp_path / "speed.csv")
    assert row["contender"] == "liger_hopper" and row["note"] == "needs a GPU"


def test_kernels_are_known_by_their_names():
    names = {
        "products": ["nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "void cutlass::Kernel2<...>",
                     "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "cublasLt::splitKreduce_kernel"],
        "pass": ["row_pass_kernel", "triton_red_fused_exp_sum_0"],
        "rest": ["void at::native::vectorized_elementwise_kernel<4, ...>", "Memset (Device)"],
    }  # fmt: skip
    for part, kernels in names.items():
        for name in kernels:
            assert speed_gpu.part_of(name) == part, name


@pytest.mark.parametrize("row_kernel", [False, True])
def test_the_gemms_alone_are_those_of_a_step(monkeypatch, row_kernel):
    monkeypatch.setattr(layout, "has_row_kernel", lambda *args: row_kernel)
    monkeypatch.setattr(layout, "TILE_ROWS", 128)
    job = Job(1024, 300, 2, 24, 40)
    gemms = [*products.at_layout(job.make())]
    assert [rows for _, rows, _, _ in gemms] == (
        [128, 128, 2048, 2048] if row_kernel else [1024] * 4
    )
    for *_, function in gemms:
        function()
    tokens = job.tokens * job.pairs
    assert sum(flops * tokens // rows for _, rows, flops, _ in gemms) == job.gemm_flops()


# Tests of the program ``gpu_day``, which runs all GPU measurements and tests

HANG = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('x'); time.sleep(3600)"


def fake(name, seconds, code, *argv):
    return gpu_day.Step(name, seconds, [sys.executable, "-c", code, *map(str, argv)])


def test_the_steps_are_in_the_order_of_their_worth(tmp_path):
    args = gpu_day.parse(["--out", str(tmp_path), "--processes", "12"])
    steps = gpu_day.steps(args)
    names = [step.name for step in steps]
    peers, later = ([f"llama3 {peer}" for peer in x] for x in (gpu_day.PEERS, gpu_day.LATER))
    assert names == ["qwen2.5", "llama3", "gpt2", *peers, "parity", *later]
    (tests,) = (step.command for step in steps if step.name == "parity")
    assert tests[-3:] == ["-n", "12", "-q"]
    for step in steps:
        if step.name == "parity":
            continue
        given = speed_gpu.parse(step.command[2:])
        assert (given.shape, given.tokens, given.device) == (step.name.split()[0], 8192, "cuda")
        alone = step.name in MODELS
        assert given.pairs == ([1, 5] if alone else [1]) and given.parts == alone
    # The time limits of the library's own steps add up to less than half of the default time.
    assert sum(gpu_day.OURS.values()) < 60 * gpu_day.MINUTES / 2


def test_a_step_that_hangs_or_fails_is_recorded_and_the_others_run(tmp_path, monkeypatch, capsys):
    """The steps that end normally have long limits, so that the test passes on a slow machine."""
    real = gpu_day.steps

    def steps(args):
        ours, parity = (step for step in real(args) if step.name in ("qwen2.5", "parity"))
        absent = f"print('needs a GPU'); raise SystemExit({speed_gpu.SKIPPED})"
        hang = fake("hangs", 1e-6, HANG, tmp_path / "hangs")
        fail = fake("fails", 60, "print('last words'); raise SystemExit(7)")
        return [hang, fail, ours, fake("absent", 60, absent), parity]

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu_day, "steps", steps)
    options = [*CPU, "--out", str(tmp_path / "out"), "--processes", "0"]
    assert gpu_day.main([*options, "--minutes", "1000"]) == 0
    rows = tables.read_csv(tmp_path / "out" / "steps.csv")
    assert [(row["step"], row["status"], row["note"]) for row in rows] == [
        ("hangs", "timed out", ""),
        ("fails", "failed with status 7", "last words"),
        ("qwen2.5", "done", ""),
        ("absent", "skipped", "needs a GPU"),
        ("parity", "done", ""),
    ]
    assert all(set(VERSIONS) <= row.keys() for row in rows)
    speed = tables.read_csv(tmp_path / "out" / "speed.csv")
    assert {"torch", "floor", "products"} <= {row["contender"] for row in speed}
    assert {row["pairs"] for row in speed if row["contender"] == "torch"} == {"1", "5"}
    (test,) = tables.read_csv(tmp_path / "out" / "tests.csv")
    assert (test["outcome"], test["note"]) == ("skipped", "no GPU")
    shown = capsys.readouterr().out
    for text in ("tests: 1 skipped", "timed out", "failed with status 7", "predicted_ms"):
        assert text in shown
    assert "self_cpu" in (tmp_path / "out" / "log.txt").read_text().lower().replace(" ", "_")
    with pytest.raises(SystemExit, match="holds another run"):
        gpu_day.main(options)


def test_a_step_starts_only_if_there_is_time(tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    monkeypatch.setattr(gpu_day, "steps", lambda args: [fake("late", 60, HANG, begun)])
    options = [*CPU, "--out", str(tmp_path / "out"), "--minutes"]
    left = 15  # in seconds: a step with a limit of 60 s starts only if 20 s are left
    assert gpu_day.main([*options, str((gpu_day.RESERVE + left) / 60)]) == 1
    (row,) = tables.read_csv(tmp_path / "out" / "steps.csv")
    assert row["status"] == "not started" and row["note"].endswith(" s are left")
    assert not begun.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_leaves_what_was_written(tmp_path, number):
    code = f"""
import sys
from benchmarks import gpu_day
from tests.benchmarks.test_gpu_reports import HANG, fake
gpu_day.steps = lambda args: [fake("first", 999, ""), fake("hangs", 999, HANG, sys.argv[1])]
sys.exit(gpu_day.main([*{CPU}, "--minutes", "1000", "--out", sys.argv[2]]))
"""
    begun, out = tmp_path / "begun", tmp_path / "out"
    command = [sys.executable, "-c", code, str(begun), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    shown, _ = process.communicate()
    assert process.returncode == 128 + number
    rows = tables.read_csv(out / "steps.csv")
    assert [(row["step"], row["status"]) for row in rows] == [
        ("first", "done"),
        ("hangs", "interrupted"),
    ]
    assert "interrupted" in shown.split("tests: none")[1]
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(os.fsencode(begun) in command for command in running)
