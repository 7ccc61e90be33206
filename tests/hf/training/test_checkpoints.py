"""A run resumes from its last complete and readable checkpoint."""

import json
import re
import shutil

import peft
import pytest

from lens_kernels import cli
from lens_kernels.hf.training.checkpoints import damage, last_whole, write_checksums
from tests.support import tiny
from tests.support.commands import arguments, assert_same_student
from tests.support.training import STUDENT, logged, make_trainer

EVERY = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "mse_coeff": 0.01}
NEEDED = ["trainer_state.json", "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt"]
NEEDED += ["rng_state.pth", "mse_projections.safetensors"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the output folder of a run that wrote two checkpoints."""
    output = tmp_path_factory.mktemp("run")
    make_trainer(output, **EVERY).train()
    return output


@pytest.fixture
def output(run, tmp_path):
    """Return a copy of the run's folder, which a test may change."""
    return shutil.copytree(run, tmp_path / "run")


def cut(file):
    """Cut off the end of a file, as a full disk does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_newest_checkpoint_by_number_is_taken(output):
    assert last_whole(output / "none", 1, True) == (None, {})
    (output / "checkpoint-1").rename(output / "checkpoint-10")
    for name in ("checkpoint-last", "checkpoint-3.bak"):
        (output / name).mkdir()
    (output / "checkpoint-11").touch()
    assert last_whole(output, 1, True) == (output / "checkpoint-10", {})


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_without_a_whole_file_is_skipped(output, name):
    last, before = output / "checkpoint-2", output / "checkpoint-1"
    damages = {"cannot be read": cut, "not be read": lambda x: x.write_bytes(b"")}
    if name != "config.json":
        damages["is missing"] = lambda x: x.unlink()
    for reason, spoil in damages.items():
        spoil(last / name)
        found, skipped = last_whole(output, 1, True)
        assert found == before and list(skipped) == [last]
        assert skipped[last].startswith(name) and reason in skipped[last]
        with pytest.raises(ValueError, match=rf"cannot resume from .*checkpoint-2: {name}"):
            make_trainer(output, **EVERY).train(resume_from_checkpoint=str(last))


def flip(file):
    """Change one bit in the middle of a file, as a failing disk does."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_with_a_changed_bit_is_skipped(output, name):
    last = output / "checkpoint-2"
    flip(last / name)
    found, skipped = last_whole(output, 1, True)
    assert found == output / "checkpoint-1"
    if name == "model.safetensors":
        cut(last / "checksums.json")
        assert damage(last, 1, True).startswith("checksums.json cannot be read")
        (last / "checksums.json").unlink()
        assert damage(last, 1, True) is None, "safetensors files have no checksum"
        expected = "model.safetensors was changed: its checksum is not that in checksums.json"
        assert skipped == {last: expected}


def test_files_in_folders_of_a_checkpoint_have_checksums(output):
    last = output / "checkpoint-2"
    (last / "model.safetensors").unlink()
    shard = last / "pytorch_model_fsdp_0" / "__0_0.distcp"
    shard.parent.mkdir()
    shard.write_bytes(b"weights")
    write_checksums(last)
    assert damage(last, 1, True) is None
    flip(shard)
    assert damage(last, 1, True).startswith("__0_0.distcp was changed")


def test_files_that_a_resume_does_not_read_may_be_missing(output):
    (output / "checkpoint-2" / "training_args.bin").write_bytes(b"")
    assert damage(output / "checkpoint-2", 1, projections=True) is None
    (output / "checkpoint-2" / "training_args.bin").unlink()
    (output / "checkpoint-2" / "mse_projections.safetensors").unlink()
    assert damage(output / "checkpoint-2", 1, projections=False) is None


def test_every_process_that_wrote_a_checkpoint_needs_its_random_state(output):
    last = output / "checkpoint-2"
    assert damage(last, 2, True) is None, "one process wrote it, and two may resume"
    shutil.move(last / "rng_state.pth", last / "rng_state_0.pth")
    assert damage(last, 1, True) == "rng_state.pth is missing"
    assert damage(last, 2, True) == "rng_state_1.pth is missing"
    shutil.copy(last / "rng_state_0.pth", last / "rng_state_1.pth")
    for processes in (1, 2, 3):
        assert damage(last, processes, True) is None
    cut(last / "rng_state_1.pth")
    assert damage(last, 2, True).startswith("rng_state_1.pth cannot be read")


def test_states_that_deepspeed_divided_over_other_ranks_are_refused(output):
    last = output / "checkpoint-2"
    (last / "global_step2").mkdir()
    for rank in range(2):
        (last / f"rng_state_{rank}.pth").write_bytes((last / "rng_state.pth").read_bytes())
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        (last / "global_step2" / name).touch()
    assert damage(last, 2, True) is None
    found, skipped = last_whole(output, 3, True)
    assert found == output / "checkpoint-1"
    assert re.search("DeepSpeed wrote it with 2 processes.* this run has 3", skipped[last])
    (last / "latest_universal").touch()
    assert damage(last, 3, True) is None


def test_shards_of_weights_are_read(output):
    last = output / "checkpoint-2"
    (last / "model.safetensors").unlink()
    tiny.model(**STUDENT).save_pretrained(last, max_shard_size="8KB")
    write_checksums(last)
    shards = sorted(last.glob("model-*.safetensors"))
    assert len(shards) > 2 and damage(last, 1, True) is None
    whole = shards[1].read_bytes()
    cut(shards[1])
    assert damage(last, 1, True).startswith(f"{shards[1].name} cannot be read")
    shards[1].unlink()
    assert damage(last, 1, True) == f"{shards[1].name} is missing"
    shards[1].write_bytes(whole)
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (last / "model.safetensors.index.json").write_text(text)
        assert damage(last, 1, True).startswith("model.safetensors.index.json cannot be read")


def test_adapters_are_read(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    student = peft.get_peft_model(tiny.model(**STUDENT), config)
    options = EVERY | {"mse_coeff": 0.0, "max_steps": 1}
    make_trainer(tmp_path, student=student, **options).train()
    last = tmp_path / "checkpoint-1"
    assert damage(last, 1, False) is None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = (last / name).read_bytes()
        cut(last / name)
        assert damage(last, 1, False).startswith(f"{name} cannot be read")
        (last / name).write_bytes(whole)
    (last / "adapter_model.safetensors").unlink()
    assert "safetensors is missing" in damage(last, 1, False)


def test_the_trainer_resumes_from_the_last_whole_checkpoint(output, caplog):
    cut(output / "checkpoint-2" / "model.safetensors")
    trainer = make_trainer(output, **EVERY)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 is skipped: model.safetensors cannot be read" in caplog.text
    assert len(trainer.state.log_history) == 3  # the logs of two steps and the summary
    with pytest.raises(ValueError, match="nothing holds no checkpoint to resume from"):
        make_trainer(output / "nothing").train(resume_from_checkpoint=True)


def test_the_batch_size_of_a_resumed_run_is_its_own(output):
    before = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    trainer = make_trainer(output, batch=2, accumulate=2, **EVERY)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    # The second step has the same four rows, but in two batches.
    assert logged(trainer)[1] == pytest.approx(before["log_history"][1]["loss"], rel=1e-4)


def test_the_command_says_which_checkpoint_it_skips(files, tmp_path, capsys):
    assert cli.main(arguments(files, tmp_path / "whole")) == 0
    argv = arguments(files, tmp_path / "cut")
    assert cli.main(argv) == 0
    (tmp_path / "cut" / "metrics.json").unlink()
    cut(tmp_path / "cut" / "checkpoint-4" / "optimizer.pt")
    capsys.readouterr()
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    last = tmp_path / "cut" / "checkpoint-4"
    assert f"{last} is skipped: optimizer.pt cannot be read" in shown
    assert f"resuming from {tmp_path / 'cut' / 'checkpoint-2'}" in shown
    assert_same_student(tmp_path / "whole", tmp_path / "cut", 1e-6)


def test_without_a_whole_checkpoint_only_an_unfinished_one_is_written_over(output):
    for step in (1, 2):
        cut(output / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* can be resumed \(checkpoint-2: model"
    ):
        last_whole(output, 1, True)
    for step in (1, 2):  # a killed run may not have written all files
        (output / f"checkpoint-{step}" / "trainer_state.json").unlink()
    found, skipped = last_whole(output, 1, True)
    assert found is None and set(skipped.values()) == {"trainer_state.json is missing"}


def test_the_matrices_of_mse_are_named_if_they_cannot_be_read(output):
    trainer = make_trainer(output, **EVERY)
    file = output / "checkpoint-2" / "mse_projections.safetensors"
    cut(file)
    with pytest.raises(ValueError, match="mse_projections.safetensors cannot be read"):
        trainer.after_loading(str(file.parent))


def test_a_state_of_something_else_is_not_whole(output):
    (output / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"a": 1}))
    assert damage(output / "checkpoint-2", 1, True) == (
        "trainer_state.json cannot be read (it holds something else)"
    )
