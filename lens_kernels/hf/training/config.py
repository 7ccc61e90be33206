"""The options of a distillation. ``--help`` shows the descriptions in this file."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from lens_kernels import dispatch
from lens_kernels.hf.cache.store import DTYPES
from lens_kernels.hf.model.anatomy import blocks_of
from lens_kernels.hf.model.layers import DEFAULT_PAIRS, check_choice, lens_layers
from lens_kernels.hf.training.data import PROMPT_STYLES, TRUNCATIONS, EncoderOptions
from lens_kernels.options import (
    ADAPTIVE,
    CHECKS,
    GRAD_THRESHOLDS,
    DistillationOptions,
    Divergence,
    check_number,
    check_option,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NAMES = (*(x.value for x in Divergence), ADAPTIVE)
# Maps the choices of ``standardize`` to the values that ``distillation_loss`` takes.
STANDARDIZE: dict[str, bool | str] = {"none": False, "lens": "lens", "all": True}
# Maps options of ``distillation_loss`` to their different names in ``LensDistillConfig``.
TRAINER_NAMES = {
    "divergence": "lens_divergence",
    "temperature": "distill_temperature",
    "backend": "lens_backend",
}


SECRET = re.compile(r"(^|_)(token|password|secret|key)$")


def is_secret(name: str) -> bool:
    """Return whether an option holds a secret, which must not be written to a run's files."""
    return SECRET.search(name) is not None


def option(default: Any, text: str, **more: Any) -> Any:
    """Return a dataclass field with a default and the option's help text."""
    return field(default=default, metadata={"help": text, **more})


def final_divergence(text: str) -> str | dict[str, float]:
    """Parse a divergence: a name, or a weighted sum such as ``0.5*forward_kl+reverse_kl``."""
    if text in FINAL_NAMES:
        return text
    weights: dict[str, float] = {}
    for term in text.replace(" ", "").split("+"):
        weight, _, name = term.rpartition("*")
        try:
            value = float(weight or 1.0)
        except ValueError:
            value = -1.0
        if value < 0 or name in weights or name not in FINAL_NAMES[:-1]:
            raise ValueError(
                f"final_divergence={text!r} is unknown: choose one of {', '.join(FINAL_NAMES)},"
                " or a weighted sum of different names other than akl, like"
                " '0.5*forward_kl + reverse_kl'"
            )
        weights[name] = value
    return weights


def grad_threshold(given: str | float | None) -> str | float | None:
    """Convert a number in a string to a float. Return any other threshold unchanged."""
    value = given
    if isinstance(given, str) and given not in GRAD_THRESHOLDS:
        with contextlib.suppress(ValueError):
            value = float(given)
    return value


@dataclass
class LensDistillConfig(TrainingArguments):
    """``TrainingArguments`` with the options of the objective. Their defaults are the paper's.

    The Trainer writes a pickle of this object into every checkpoint. So pickles and copies leave
    out secrets such as ``hub_token``. ``lens_divergence``, ``distill_temperature`` and
    ``lens_backend`` set ``divergence``, ``temperature`` and ``backend`` of ``distillation_loss``.

    Raises:
        ValueError: An option is out of range, options contradict each other, or an option of the
            Trainer is not supported with a teacher (``torch_compile``, label smoothing).
        TypeError: An option has the wrong type.
    """

    output_dir: str | None = option(
        None, "Folder for checkpoints, the trained student and reports.", aliases=["--output"]
    )
    student_layers: list[int] | None = option(
        None, "Student blocks whose outputs are compared (1 is the first). Default: evenly spaced."
    )
    teacher_layers: list[int] | None = option(
        None, "Teacher blocks, one for each student block. Default: evenly spaced."
    )
    num_lens_pairs: int | None = option(
        None,
        "Number of lens pairs if no layers are given. 0 compares only the final outputs. Default:"
        f" {DEFAULT_PAIRS}, or fewer if a model has fewer than {DEFAULT_PAIRS + 1} blocks.",
    )
    lens_divergence: str = option(
        DistillationOptions.divergence,
        "Divergence of the lens pairs.",
        choices=[x.value for x in Divergence],
    )
    lens_coeff: float = option(DistillationOptions.lens_coeff, "Weight of the lens term.")
    lens_norm: bool = option(
        True,
        "Apply the model's final norm to intermediate hidden states before the output head. The"
        " paper's published code does not apply it.",
    )
    final_divergence: str = option(
        DistillationOptions.final_divergence,
        "Divergence of the final outputs: a lens divergence, 'akl', or a weighted sum like"
        " '0.5*forward_kl+reverse_kl'.",
    )
    beta: float = option(DistillationOptions.beta, "Weight of the teacher in jsd, in (0, 1).")
    distill_temperature: float = option(
        DistillationOptions.temperature,
        "Temperature that divides both models' logits.",
    )
    teacher_temperature: float | None = option(
        DistillationOptions.teacher_temperature,
        "Temperature of the teacher's logits; default: distill_temperature.",
    )
    temperature_squared: bool = option(
        DistillationOptions.temperature_squared,
        "Multiply the divergences by the square of distill_temperature.",
    )
    standardize: str = option(
        "none",
        "Divide logits by their deviation in each token: none, those of the lens pairs, or all.",
        choices=[*STANDARDIZE],
    )
    token_clip: float | None = option(
        DistillationOptions.token_clip,
        "Upper bound of each token's divergence, in nats. The logs report the share of bounded"
        " values as 'clipped'.",
    )
    kd_ratio: float = option(
        DistillationOptions.kd_ratio,
        "Weight of distillation. Cross entropy has weight 1 - kd_ratio. 0 needs no teacher.",
    )
    mse_coeff: float = option(
        0.0,
        "Weight of the mean squared error between the student's hidden states and a learnt linear"
        " map of the teacher's hidden states, at the lens layers. A baseline to compare with.",
    )
    student_lens: str | None = option(
        None,
        "File of translators for the student's lens layers, as lens-kernels tune-lens writes it.",
    )
    teacher_lens: str | None = option(
        None, "File of translators for the teacher's lens layers. They stay as they are."
    )
    train_student_lens: bool = option(
        False,
        "Train the student's translators along. Without --student_lens they start as zeros, which"
        " change nothing.",
    )
    vocab_size: int | None = option(
        None, "Number of leading vocabulary entries that both models share, if their sizes differ."
    )
    lens_backend: str = option(
        DistillationOptions.backend,
        "Implementation of the loss.",
        choices=["auto", *dispatch.REGISTRY],
    )
    grad_threshold: str | None = option(
        None,
        "Skip vocabulary entries whose logit gradients are below this threshold, to speed up the"
        " backward pass: a number like 1e-6, or 'bf16' to stay within the rounding error of"
        " bfloat16. The logs report the skipped share of the gradient as 'dropped'.",
    )
    teacher_cache: str | None = option(
        None,
        "Folder to cache the teacher's hidden states. Training then runs without the teacher.",
    )
    teacher_targets: str | None = option(
        None,
        "Folder of sparse targets, made by lens-kernels cache. They replace the teacher's output."
        " Set --final_divergence forward_kl, and --num_lens_pairs 0 or a --teacher for the pairs.",
    )
    teacher_cache_dtype: str = option(
        "float32", "Dtype of the cached hidden states.", choices=list(DTYPES)
    )
    prompt_style: str = option(
        "alpaca",
        "Format of prompts from instruction/input: the Alpaca text or the tokenizer's chat"
        " template.",
        choices=list(PROMPT_STYLES),
    )
    max_length: int = option(
        512, "Maximum tokens per example; with packing, tokens per row of a batch."
    )
    max_prompt_length: int = option(256, "Maximum tokens per prompt.")
    truncation: str = option(
        "end",
        "Treatment of rows that are too long. 'end' cuts the end of the response, and drops rows"
        " with a longer prompt. 'drop' drops rows. 'error' stops.",
        choices=list(TRUNCATIONS),
    )
    on_policy: float = option(
        0.0,
        "Share of the training batches whose answers are sampled from the student. The answers in"
        " the data are then not used.",
    )
    packing: bool = option(
        False,
        "Pack several training examples into each row of a batch. Examples do not see each other.",
    )
    save_total_limit: int | None = option(
        2,
        "Number of checkpoints to keep; the oldest are deleted. With load_best_model_at_end, the"
        " best one is kept too.",
    )
    logging_steps: float = option(10, "Log every N steps; below 1, a fraction of all steps.")

    def __post_init__(self) -> None:
        """Check the options before any model is loaded."""
        # Check torch_compile first, because super() sets environment variables for it in some
        # versions.
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError(
                "torch_compile=True is not supported, because the loss runs inside the student's"
                " forward call and compiles its own code: leave it out"
            )
        super().__post_init__()
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            check_number(name, getattr(self, name), 1, inclusive=True)
        for name in ("learning_rate", "num_train_epochs"):
            check_number(name, getattr(self, name), 0, inclusive=True)
        for event in ("logging", "save", "eval"):
            if getattr(self, f"{event}_strategy") == "steps":
                check_number(f"{event}_steps", getattr(self, f"{event}_steps"), 0)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0, inclusive=True)
        check_number("seed", self.seed, 0, 2**32 - 1, inclusive=True)
        check_number("mse_coeff", self.mse_coeff, 0.0, inclusive=True)
        for name, value in self.loss_options().items():
            if name in CHECKS:
                check_option(name, value, TRAINER_NAMES.get(name))
        check_number("on_policy", self.on_policy, 0.0, 1.0, inclusive=True)
        stored = self.teacher_cache or self.teacher_targets
        if self.on_policy and (stored or self.packing or not self.kd_ratio):
            raise ValueError(
                f"on_policy={self.on_policy} compares student and teacher on new answers: leave"
                " teacher_cache, teacher_targets and packing out, and set a positive kd_ratio"
            )
        for name in ("student_lens", "teacher_lens", "train_student_lens"):
            pairs = self.student_layers or self.num_lens_pairs != 0
            if getattr(self, name) and not (pairs and self.kd_ratio):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without lens pairs: leave it"
                    " out, or set a positive num_lens_pairs and kd_ratio"
                )
        check_choice(self.num_lens_pairs, self.student_layers, self.teacher_layers)
        checkpointing = self.gradient_checkpointing_kwargs
        if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} would block the gradients of"
                " the lenses to the student's blocks: use the default, False"
            )
        if self.label_smoothing_factor and self.kd_ratio > 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect if kd_ratio"
                " is positive: set it to 0, or set kd_ratio=0 to fine-tune without distillation"
            )

    def __getstate__(self) -> dict[str, object]:
        return {name: None if is_secret(name) else value for name, value in vars(self).items()}

    def layers(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> tuple[list[int], list[int]]:
        """Return the blocks of ``student`` and ``teacher`` whose outputs are compared."""
        student_blocks, teacher_blocks = len(blocks_of(student)), len(blocks_of(teacher))
        given = self.num_lens_pairs, self.student_layers, self.teacher_layers
        return lens_layers(student_blocks, teacher_blocks, *given)

    def loss_options(self) -> dict[str, Any]:
        """Return the keyword arguments for ``distillation_loss``."""
        names = [x.name for x in fields(DistillationOptions)]
        own = {name: TRAINER_NAMES.get(name, name) for name in names}
        values = {name: getattr(self, x) for name, x in own.items() if hasattr(self, x)}
        values["standardize"] = STANDARDIZE[self.standardize]
        values["final_divergence"] = final_divergence(self.final_divergence)
        values["grad_threshold"] = grad_threshold(self.grad_threshold)
        return values

    def encoder_options(self) -> EncoderOptions:
        """Return the keyword arguments for ``Encoder``."""
        return {
            "prompt_style": self.prompt_style,
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "truncation": self.truncation,
        }

    def objective_options(self) -> dict[str, Any]:
        """Return the keyword arguments for ``LensObjective``."""
        own = "lens_norm", "mse_coeff", "student_lens", "teacher_lens", "train_student_lens"
        return {**self.loss_options(), **{name: getattr(self, name) for name in own}}

    @property
    def trains_matrices(self) -> bool:
        """Whether matrices beside the student are trained: for the MSE term, or translators."""
        return self.mse_coeff > 0 or self.train_student_lens
