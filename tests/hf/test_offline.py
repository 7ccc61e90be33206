"""No command opens a connection to the Hub unless its options allow downloads."""

import peft
import pytest

from lens_kernels import cli
from lens_kernels.hf.model.loading import load_model
from tests.support.commands import arguments


@pytest.fixture
def adapter(files, hub, tmp_path):
    """Return a folder with an adapter. The Hub's cache has its base model and tokenizer."""
    student = load_model(hub(files / "student", "some/student"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(student, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("more", [[], ["--config", "config.yaml"]], ids=["options", "file"])
@pytest.mark.parametrize("command", ["train", "eval", "inspect"])
def test_no_command_opens_a_connection(
    files, adapter, tmp_path, monkeypatch, connections, command, more
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("beta: 0.25\n")
    output = tmp_path / "out"
    argv = {
        "train": [*arguments(files, output, student=adapter), *more],
        "eval": ["eval", "--student", adapter, "--data", files / "eval.jsonl"]
        + ["--max_new_tokens", 2],
        "inspect": ["inspect", "--student", adapter, "--teacher", files / "teacher"]
        + ["--text", "a cat", "--output", output],
    }[command]
    assert cli.main(list(map(str, argv))) == 0
    assert connections == []
