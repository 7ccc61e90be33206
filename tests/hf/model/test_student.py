"""The layers that lenses compare, and students that consist of some blocks of their teacher."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lens_kernels.hf.model import anatomy as fam
from lens_kernels.hf.model.layers import check_layers, uniform_layers
from lens_kernels.hf.model.student import shallow_copy
from tests.support import tiny
from tests.support.compare import assert_close


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (12, [2, 4, 6, 8, 10]),
        (24, [4, 8, 12, 16, 20]),
        (48, [8, 16, 24, 32, 40]),
        (28, [6, 11, 17, 22]),
        (36, [7, 14, 22, 29]),
        (5, [2]),
    ],
)
def test_uniform_layers_gives_the_lists_of_the_paper(layers, expected):
    assert uniform_layers(len(expected), layers) == expected


@pytest.mark.parametrize("number", [0, 4])
def test_layers_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match=rf"num_pairs must lie in \[1, 3\].*got {number}"):
        uniform_layers(number, 4)
    assert check_layers("teacher_layers", [1, 3], 4) == [1, 3]
    with pytest.raises(ValueError, match=rf"teacher_layers must lie in \[1, 3\], got {number}"):
        check_layers("teacher_layers", [1, number], 4)


def skipping(model, blocks, ids):
    """Return the logits that the model gives if only ``blocks`` run."""

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
@pytest.mark.parametrize("kind", [x for x in tiny.KINDS if x != "phi"])
def test_shallow_copy_equals_the_teacher_without_the_other_blocks(kind, tied):
    """Each block keeps its attention type: blocks 1, 3 and 5 may use a sliding window."""
    teacher = tiny.model(kind, layers=5, tie_word_embeddings=tied)
    ids = torch.arange(2, 26).view(2, 12)
    student = shallow_copy(teacher, [2, 3, 5]).eval()
    assert student.config.get_text_config().num_hidden_layers == len(fam.blocks_of(student)) == 3
    assert teacher.config.get_text_config().num_hidden_layers == 5
    expected = skipping(teacher, [2, 3, 5], ids)
    with torch.no_grad():
        assert_close(student(ids).logits, expected, 1e-5)
        assert (teacher(ids).logits - expected).abs().max() > 0.05 * expected.abs().max()
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    fam.verify_lens(student)


def test_shallow_copy_can_be_saved_and_loaded(tmp_path):
    student = shallow_copy(tiny.model("gemma2", layers=5), [2, 3, 5]).eval()
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_blocks_that_depend_on_their_depth_are_refused():
    # In transformers 4.56, only eager attention supports this option.
    options = {"scale_attn_by_inverse_layer_idx": True, "attn_implementation": "eager"}
    teacher = tiny.model("gpt2", layers=5, **options)
    with pytest.raises(ValueError, match=r"blocks \[2, 4\] of GPT2.*logits differ.*depth"):
        shallow_copy(teacher, [2, 4])
    assert not any(block._forward_hooks for block in fam.blocks_of(teacher))
    first = shallow_copy(teacher, [1, 2]).eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert_close(first(ids).logits, skipping(teacher, [1, 2], ids), 1e-5)


def test_lists_by_layer_are_cut_and_lists_of_ids_are_not():
    teacher = tiny.model(layers=4, eos_token_id=[1, 2, 3, 4])
    teacher.config.by_layer = [10, 20, 30, 40]
    config = shallow_copy(teacher, [2, 4]).config
    assert (config.by_layer, config.eos_token_id) == ([20, 40], [1, 2, 3, 4])
    assert teacher.config.by_layer == [10, 20, 30, 40]


def test_a_shallow_copy_does_not_keep_the_teachers_name(tmp_path):
    """With this name, an adapter of the copy would record the teacher as its base model."""
    tiny.model().save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path)
    student = peft.get_peft_model(shallow_copy(teacher, [1, 3]), peft.LoraConfig())
    assert teacher.name_or_path == str(tmp_path)
    assert not student.peft_config["default"].base_model_name_or_path


def test_a_shallow_copy_shares_nothing_can_be_trained_and_generates_alike():
    teacher = tiny.model(layers=3).requires_grad_(False)
    teacher.generation_config.max_new_tokens = 7
    student = shallow_copy(teacher, [1, 3])
    own = {parameter.data_ptr() for parameter in teacher.parameters()}
    for parameter in student.parameters():
        assert parameter.requires_grad and parameter.data_ptr() not in own
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config


def test_shallow_copy_has_the_teachers_dtypes_and_device():
    """Rotary frequencies stay float32, although no checkpoint contains them."""
    teacher = tiny.model().to(torch.bfloat16)
    teacher.model.norm.float()
    teacher.model.rotary_emb.float()
    student = shallow_copy(teacher, [1, 2])
    mlp = student.model.layers[0].mlp.up_proj
    dtypes = [module.weight.dtype for module in (student.model.norm, student.lm_head, mlp)]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    fresh = tiny.model().model.rotary_emb.inv_freq
    assert torch.equal(student.model.rotary_emb.inv_freq, fresh)
    student = shallow_copy(teacher.to("meta"), [1, 2])
    assert {x.device.type for x in (*student.parameters(), *student.buffers())} == {"meta"}


def test_shallow_copy_refuses_bad_blocks_and_quantized_weights():
    teacher = tiny.model(layers=6)
    with pytest.raises(ValueError, match=r"blocks must lie in \[1, 6\], got 7"):
        shallow_copy(teacher, [1, 7])
    for blocks in ([], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="at least one block, in ascending order, got"):
            shallow_copy(teacher, blocks)
    weight = teacher.model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(TypeError, match=r"'model.layers.1.mlp.up_proj.weight' is not one: merge"):
        shallow_copy(teacher, [1, 2])
    weight.data = torch.zeros(3)  # a packed weight, as some quantization libraries make
    with pytest.raises(TypeError, match="plain floating-point weights.*dequantise"):
        shallow_copy(teacher, [1, 2])


def test_shallow_copy_refuses_adapters_until_they_are_merged():
    teacher = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"q_proj.weight' is not one: merge its adapters"):
        shallow_copy(teacher, [1, 2])
    fam.verify_lens(shallow_copy(teacher.merge_and_unload(), [1, 2]))
