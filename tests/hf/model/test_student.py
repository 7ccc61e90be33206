"""The depths that are compared, and students made of some of their teacher's blocks."""

import peft
import pytest
import torch

from lens_kernels.hf.model import families as fam
from lens_kernels.hf.model import verification
from lens_kernels.hf.model.layers import check_layers, uniform_layers
from lens_kernels.hf.model.student import shallow_copy
from tests.support import tiny


@pytest.mark.parametrize(
    ("pairs", "layers", "expected"),
    [
        (5, 12, [2, 4, 6, 8, 10]),
        (5, 24, [4, 8, 12, 16, 20]),
        (5, 48, [8, 16, 24, 32, 40]),
        (4, 28, [6, 11, 17, 22]),
        (4, 36, [7, 14, 22, 29]),
        (1, 5, [2]),
    ],
)
def test_uniform_rule_gives_the_papers_lists(pairs, layers, expected):
    assert uniform_layers(pairs, layers) == expected


@pytest.mark.parametrize("pairs", [0, 4])
def test_the_uniform_rule_refuses_more_pairs_than_depths(pairs):
    with pytest.raises(ValueError, match=rf"num_pairs must lie in \[1, 3\].*got {pairs}"):
        uniform_layers(pairs, 4)


@pytest.mark.parametrize("depth", [0, 4])
def test_depths_that_are_no_lens_are_refused(depth):
    assert check_layers("teacher_layers", [1, 3], 4) == [1, 3]
    with pytest.raises(ValueError, match=rf"teacher_layers must lie in \[1, 3\], got {depth}"):
        check_layers("teacher_layers", [1, depth], 4)


def skipping(model, blocks, ids):
    """Return the logits of the model where only ``blocks`` run."""

    def skip(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [
        block.register_forward_hook(skip, with_kwargs=True)
        for depth, block in enumerate(fam.blocks_of(model), 1)
        if depth not in blocks
    ]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", sorted(fam.FAMILIES))
def test_a_shallow_copy_is_the_teacher_without_the_other_blocks(kind, tied):
    """The kept blocks attend as they did: of the first five, the odd ones slide."""
    teacher = tiny.model(kind, layers=5, tie_word_embeddings=tied)
    ids = torch.arange(2, 26).view(2, 12)
    student = shallow_copy(teacher, [2, 3, 5]).eval()
    text = student.config.get_text_config()
    assert text.num_hidden_layers == len(fam.blocks_of(student)) == 3
    assert teacher.config.get_text_config().num_hidden_layers == 5
    expected = skipping(teacher, [2, 3, 5], ids)
    with torch.no_grad():
        found = student(ids).logits
        whole = teacher(ids).logits
    torch.testing.assert_close(found, expected)
    assert (whole - expected).abs().max() > 0.05 * expected.abs().max()
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    verification.verify_lens(student)


def test_a_shallow_copy_survives_being_saved(tmp_path):
    student = shallow_copy(tiny.model("gemma2", layers=5), [2, 3, 5]).eval()
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_a_shallow_copy_shares_nothing_and_can_be_trained():
    teacher = tiny.model(layers=3).requires_grad_(False)
    student = shallow_copy(teacher, [1, 3])
    own = {parameter.data_ptr() for parameter in teacher.parameters()}
    for parameter in student.parameters():
        assert parameter.requires_grad and parameter.data_ptr() not in own


def test_a_shallow_copy_has_the_teachers_dtypes():
    """Rotary frequencies are float32 in every model, and in no checkpoint."""
    teacher = tiny.model().to(torch.bfloat16)
    teacher.model.norm.float()
    teacher.model.rotary_emb.float()
    student = shallow_copy(teacher, [1, 2])
    assert student.model.norm.weight.dtype == torch.float32
    assert student.lm_head.weight.dtype == student.model.layers[0].mlp.up_proj.weight.dtype
    assert student.lm_head.weight.dtype == torch.bfloat16
    fresh = tiny.model().model.rotary_emb.inv_freq
    assert torch.equal(student.model.rotary_emb.inv_freq, fresh)


def test_a_shallow_copy_lies_where_its_teacher_does():
    student = shallow_copy(tiny.model().to("meta"), [1, 2])
    tensors = [*student.parameters(), *student.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_shallow_copy_generates_as_its_teacher_does():
    teacher = tiny.model()
    teacher.generation_config.max_new_tokens = 7
    student = shallow_copy(teacher, [1, 2])
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config


def test_what_cannot_be_copied_is_refused():
    teacher = tiny.model(layers=6)
    with pytest.raises(ValueError, match=r"blocks must lie in \[1, 6\], got 7"):
        shallow_copy(teacher, [1, 7])
    weight = teacher.model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(TypeError, match=r"'model.layers.1.mlp.up_proj.weight' is not one: merge"):
        shallow_copy(teacher, [1, 2])
    weight.data = torch.zeros(3)  # packed
    with pytest.raises(TypeError, match="plain floating-point weights.*dequantise"):
        shallow_copy(teacher, [1, 2])


def test_an_adapted_teacher_is_copied_once_it_is_merged():
    teacher = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"q_proj.weight' is not one: merge its adapters"):
        shallow_copy(teacher, [1, 2])
    verification.verify_lens(shallow_copy(teacher.merge_and_unload(), [1, 2]))
