"""The workflows run reviewed code only, and nothing is published by accident."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit(path):
    actions = re.findall(r"uses: (.*)$", path.read_text(), re.MULTILINE)
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action), action


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_workflows_run_targets_that_exist(path):
    text = path.read_text()
    named = re.findall(r"target: ([\w-]+)|run: make ([\w-]+)$", text, re.MULTILINE)
    assert named and {name for pair in named for name in pair if name} <= {*TARGETS}


def test_only_a_release_or_a_person_publishes():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    assert {*workflow[True]} == {"release", "workflow_dispatch"}  # YAML reads "on" as True
    jobs = workflow["jobs"]
    # Only the job that uploads can ask PyPI for a token, and it runs no code of this checkout.
    assert [name for name, job in jobs.items() if job.get("permissions")] == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert not [step for step in jobs["publish"]["steps"] if "run" in step]


@pytest.mark.parametrize("path", (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir(), ids=str)
def test_issue_templates_can_be_read(path):
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(names) == len({*names}) > 1
