"""Transfer learning: what one network has learned, taken to another task or domain."""

from jaxmeta.transfer.alignment import Aligned, Alignment, align, coral, dann, mmd
from jaxmeta.transfer.classifier import (
    accuracy,
    classifier,
    confusion_matrix,
    extract_features,
    predict_logits,
    with_body,
)
from jaxmeta.transfer.discrepancy import coral_loss, coral_transform, covariance, dan_loss, mmd2
from jaxmeta.transfer.domain_adaptation import (
    adabn,
    dann_rate,
    dann_schedule,
    dann_strength,
    domain_accuracy,
    domain_loss,
    gradient_reversal,
)
from jaxmeta.transfer.fine_tune import (
    Fitted,
    feature_extraction,
    fine_tune,
    fine_tuning_probe,
    gradual_unfreezing,
    linear_probe_then_fine_tune,
)
from jaxmeta.transfer.freezing import discriminative, freeze, frozen_mask, l2_sp, slanted_triangular
from jaxmeta.transfer.heads import logistic_head, mapped_head, ridge_head
from jaxmeta.transfer.importance import density_ratio, effective_sample_size, kernel_mean_matching
from jaxmeta.transfer.inputs import input_adapter, learned_stem
from jaxmeta.transfer.label_shift import adjust, bbse, em_prior, joint_confusion, rlls, temperature
from jaxmeta.transfer.pretrained import Pretrained, load_pretrained, read_weights, save_pretrained
from jaxmeta.transfer.ranking import Candidate, Ranking, rank_sources
from jaxmeta.transfer.scores import h_score, leep, log_me, nce
from jaxmeta.transfer.subtree import (
    leaves_by_path,
    mask,
    matching,
    rename,
    swap_subtree,
    take_subtree,
    transplant,
)

__all__ = [
    "Aligned",
    "Alignment",
    "Candidate",
    "Fitted",
    "Pretrained",
    "Ranking",
    "accuracy",
    "adabn",
    "adjust",
    "align",
    "bbse",
    "classifier",
    "confusion_matrix",
    "coral",
    "coral_loss",
    "coral_transform",
    "covariance",
    "dan_loss",
    "dann",
    "dann_rate",
    "dann_schedule",
    "dann_strength",
    "density_ratio",
    "discriminative",
    "domain_accuracy",
    "domain_loss",
    "effective_sample_size",
    "em_prior",
    "extract_features",
    "feature_extraction",
    "fine_tune",
    "fine_tuning_probe",
    "freeze",
    "frozen_mask",
    "gradient_reversal",
    "gradual_unfreezing",
    "h_score",
    "input_adapter",
    "joint_confusion",
    "kernel_mean_matching",
    "l2_sp",
    "learned_stem",
    "leaves_by_path",
    "leep",
    "linear_probe_then_fine_tune",
    "load_pretrained",
    "log_me",
    "logistic_head",
    "mapped_head",
    "mask",
    "matching",
    "mmd",
    "mmd2",
    "nce",
    "predict_logits",
    "rank_sources",
    "read_weights",
    "rename",
    "ridge_head",
    "rlls",
    "save_pretrained",
    "slanted_triangular",
    "swap_subtree",
    "take_subtree",
    "temperature",
    "transplant",
    "with_body",
]
