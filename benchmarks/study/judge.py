"""The metrics of a student, computed from full logits and without the library's loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The number of rows that the models process at a time.
CHUNK = 8
# The numbers of tokens of a prompt and of its continuation, and the number of prompts.
PROMPT, CONTINUED, PROMPTS = 64, 32, 128
# The number of confidence bins in the calibration error.
BINS = 15


def _final(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=rows).logits[:, :-1].flatten(0, 1).log_softmax(-1)


@torch.no_grad()
def greedy(model: Any, rows: Tensor) -> Tensor:
    """Return the model's greedy continuations of the first tokens of rows."""
    prompts = rows[:PROMPTS, :PROMPT]
    mask = torch.ones_like(prompts)
    # All continuations have the same length, because no end token is allowed. So none needs
    # padding.
    length = {"max_new_tokens": CONTINUED, "min_new_tokens": CONTINUED}
    out = model.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
    return out[:, PROMPT:]


@dataclass(frozen=True)
class Judge:
    """The teacher's results on held-out rows, with which students are compared."""

    teacher: Any
    rows: Tensor
    log_p: list[Tensor]  # the teacher's log probabilities, a tensor for each chunk of rows
    continuation: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Any, rows: Tensor) -> Judge:
        """Run the teacher on the rows and return its results."""
        log_p = [_final(teacher, chunk) for chunk in rows.split(CHUNK)]
        return cls(teacher, rows, log_p, greedy(teacher, rows))

    def _chunks(self, model: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        training = model.training
        model.eval()
        for chunk, log_p in zip(self.rows.split(CHUNK), self.log_p, strict=True):
            yield log_p, _final(model, chunk), chunk[:, 1:].flatten()
        model.train(training)

    @torch.no_grad()
    def forward_kl(self, student: Any) -> float:
        """Return the student's KL(teacher, student), in nats per token."""
        values = [(p.exp() * (p - q)).sum(-1) for p, q, _ in self._chunks(student)]
        return torch.cat(values).mean().item()

    @torch.no_grad()
    def final(self, student: Any) -> dict[str, float]:
        """Return the metrics of a trained student's output, in nats per token or as shares."""
        names = ("kl", "reverse_kl", "ce", "entropy", "agreement", "overconfident")
        values: dict[str, list[Tensor]] = {name: [] for name in names}
        confidences, hits = [], []
        for log_p, log_q, labels in self._chunks(student):
            p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
            top_p, top_q = log_p.max(-1), log_q.max(-1)
            values["kl"].append((p * d).sum(-1))
            values["reverse_kl"].append(-(q * d).sum(-1))
            values["ce"].append(-log_q.gather(1, labels[:, None])[:, 0])
            values["entropy"].append(-(q * log_q).sum(-1))
            values["agreement"].append((top_p.indices == top_q.indices).float())
            values["overconfident"].append((top_q.values > top_p.values).float())
            confidences.append(top_q.values.exp())
            hits.append((top_q.indices == labels).float())
        means = {name: torch.cat(x).mean().item() for name, x in values.items()}
        means["calibration_error"] = _calibration_error(torch.cat(confidences), torch.cat(hits))
        same = (greedy(student, self.rows) == self.continuation).float()
        means["greedy_prefix"] = same.cumprod(1).sum(1).mean().item()
        return means

    @torch.no_grad()
    def by_depth(self, student: Any) -> list[dict[str, float]]:
        """Return, for each student block, metrics that compare its lens with a teacher's lens.

        The teacher's block is at the same relative depth.
        """
        depth, teacher_depth = (len(x.model.layers) for x in (student, self.teacher))
        pairs = [(i, round(i * teacher_depth / depth)) for i in range(1, depth + 1)]
        values: list[dict[str, list[Tensor]]] = [{} for _ in pairs]
        for chunk in self.rows.split(CHUNK):
            states = _states(self.teacher, chunk), _states(student, chunk)
            for sums, (i, j) in zip(values, pairs, strict=True):
                log_p, log_q = _lens(self.teacher, states[0], j), _lens(student, states[1], i)
                p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
                log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
                parts = {
                    "entropy_student": -(q * log_q).sum(-1),
                    "entropy_teacher": -(p * log_p).sum(-1),
                    "kl": (p * d).sum(-1),
                    "reverse_kl": -(q * d).sum(-1),
                    "jsd": ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
                    "overconfident": (log_q.amax(-1) > log_p.amax(-1)).float(),
                }
                for name, value in parts.items():
                    sums.setdefault(name, []).append(value)
        results = []
        for sums, (i, j) in zip(values, pairs, strict=True):
            means = {name: torch.cat(x).mean().item() for name, x in sums.items()}
            results.append({"depth": i, "teacher_depth": j, **means})
        return results


def _states(model: Any, rows: Tensor) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] = model.model(
        input_ids=rows, output_hidden_states=True
    ).hidden_states
    return states


def _lens(model: Any, states: tuple[Tensor, ...], depth: int) -> Tensor:
    """Return the log probabilities of the lens after a block.

    After the last block, these are the log probabilities of the model's output.
    """
    hidden = states[depth]
    if depth < len(states) - 1:  # the model has already applied the norm to its final states
        hidden = model.model.norm(hidden)
    log_p: Tensor = model.lm_head(hidden[:, :-1]).flatten(0, 1).log_softmax(-1)
    return log_p


def _calibration_error(confidence: Tensor, hit: Tensor) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy.

    A prediction is correct if it is the next token of the text.
    """
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, confidence - hit)
    return (gaps.abs().sum() / len(hit)).item()
