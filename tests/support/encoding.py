"""A tokenizer with a chat template, a conversation, and the text of an encoded example."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": " one "},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": "two"},
]


def bpe(template=CHAT, bos=False, **special):
    """Return a byte-level BPE tokenizer, whose tokens may span the ends of lines and words."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["### Response:\nyes", "assistant\nyes", "abcd"] * 9, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **names)


def halves(tokenizer, example):
    """Return the text of an example, and a list of the texts that have labels."""
    runs, before = [], -100
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            runs.append([]) if before == -100 else None
            runs[-1].append(label)
        before = label
    return tokenizer.decode(example["input_ids"]), [tokenizer.decode(run) for run in runs]
