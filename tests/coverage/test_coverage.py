"""docs/models.md agrees with the table of checks. Repeated checks give the same results."""

import pytest

from benchmarks.support.tables import read_csv
from tests.coverage.__main__ import FIELDS, TABLE, VERSIONS, types
from tests.coverage.checks import check
from tests.coverage.page import PAGE, made_with, page

ROWS = {(row["group"], row["type"]): row for row in read_csv(TABLE)}
QUICK = [
    ("causal", "llama"),
    ("causal", "gpt2"),
    ("causal", "gemma2"),
    ("causal", "granite"),
    ("causal", "cohere"),
    ("causal", "falcon_mamba"),
    ("causal", "bert"),
    ("causal", "opt"),
    ("causal", "qwen3_moe"),
    ("image-text", "gemma3"),
]


def agree(found, expected):
    assert {k: found[k] for k in FIELDS if k != "why"} == {
        k: expected[k] for k in FIELDS if k != "why"
    }, found["why"]


@pytest.mark.parametrize(("group", "kind"), QUICK, ids=[kind for _, kind in QUICK])
def test_a_type_does_what_the_table_says(group, kind):
    agree(check(kind, group), ROWS[group, kind])


def test_the_page_is_made_of_the_table():
    assert PAGE.read_text() == page(list(ROWS.values()), made_with(), read_csv(VERSIONS))


def test_the_table_has_the_types_that_are_promised():
    lenses = [row for row in ROWS.values() if row["lens"] == "yes"]
    groups = [row["group"] for row in lenses]
    assert groups.count("causal") >= 162 and groups.count("image-text") >= 71
    promised = """qwen2 qwen3 qwen3_moe qwen3_next qwen3_5 llama llama4 smollm3 gemma2 gemma3 gemma4
    mistral mixtral ministral deepseek_v2 deepseek_v3 gpt_oss phi3 phi4_multimodal olmo2 olmo3 glm4
    granite granitemoehybrid falcon_h1 nemotron_h lfm2 cohere cohere2 starcoder2 gptj bloom stablelm
    mamba2 gpt2 gpt_neox opt"""
    assert set(promised.split()) <= {row["type"] for row in lenses}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "kind"), ROWS, ids=[kind for _, kind in ROWS])
def test_every_type_does_what_the_table_says(group, kind):
    if (group, kind) not in types():
        pytest.skip("this version of transformers lists another set of types")
    agree(check(kind, group), ROWS[group, kind])
