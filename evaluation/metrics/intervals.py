"""Compute 95 % confidence intervals of metrics.

Every metric is written as a mean over rows (`compute_contributions`): exactly where it is
a mean, and to first order (by its influence function) where it is a ratio or a macro
average. No interval is computed from too few rows.

Shapes: R rows, M models (one per seed), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorafleet.evaluation.metrics.predictions import CONFUSION_METRICS, Classified, RowResults
from lorafleet.jobs.schema.metrics import TEXT_METRICS

Interval = tuple[float, float]
MIN_ROWS = 6
"""Fewest rows for an interval or a decision: the exact sign-flip test of 5 rows cannot go below p =
0.0625.
"""
MIN_ROWS_PER_CLASS = 10
"""Fewest rows of every class for the interval of a macro average (checked by simulation in
test_decisions.py).
"""
SHARES = frozenset({*CONFUSION_METRICS, *TEXT_METRICS} - {"length_ratio"})
"""Metrics between 0 and 1."""
_MACRO = ("f1", "precision", "recall")
_PSEUDO_ROWS = 4.0
"""Rows added to a proportion, half of them right and half wrong (Agresti and Coull 1998)."""
_Z = 1.959963984540054
_UPPER = 0.975


def compute_contributions(results: RowResults, name: str) -> np.ndarray:
    """Return the contribution (R) of each row to a metric.

    Their mean is the metric. For a ratio of sums, a macro average and perplexity, the
    contributions are the value plus the row's influence on it (first-order, the delta
    method). Differences and variances of metrics can then be computed as for a mean.

    Args:
        results: Per-row results of one model.
        name: A metric for which `results.has_metric` is True.
    """
    if name == "perplexity":
        loss_R = compute_contributions(results, "loss")
        mean_loss = loss_R.mean()
        # An untrained model can have a loss whose exponential overflows. Infinity is then the right
        # value, and needs no warning.
        with np.errstate(over="ignore"):
            perplexity = np.exp(mean_loss)
        perplexity_R: np.ndarray = perplexity * (1 + loss_R - mean_loss)
        return perplexity_R
    if name == "accuracy" and results.classified:
        classified = results.classified
        correct_R: np.ndarray = (classified.label_R == classified.predicted_R).astype(float)
        return correct_R
    if name in _MACRO and results.classified:
        classified = results.classified
        value, influence_CC = _compute_macro_average(count_confusions(classified), name)
        macro_R: np.ndarray = value + influence_CC[classified.label_R, classified.predicted_R]
        return macro_R
    numerator_R, denominator_R = results.get_ratio(name)
    # For example a length ratio to references that are all empty.
    if denominator_R.sum() == 0:
        return np.zeros(len(numerator_R))
    ratio = numerator_R.sum() / denominator_R.sum()
    ratio_R: np.ndarray = ratio + (numerator_R - ratio * denominator_R) / denominator_R.mean()
    return ratio_R


def compute_confidence_interval(
    results: RowResults | Sequence[RowResults], name: str
) -> Interval | None:
    """Compute the 95 % confidence interval of a metric.

    Methods: Wilson (1927) for a proportion of one model; Agresti and Coull (1998), applied
    to the confusion matrix, for macro averages; Student's t with Hall's correction for
    skewness (1992) for means.

    Args:
        results: One model, or several on the same rows (an arm's seeds). The interval of
            several is that of their mean, over rows and over seeds.
        name: Name of the metric.

    Returns:
        (low, high), within 0 and 1 for metrics that are. None if there is no interval (see
            `explain_missing_interval`) or a value is not finite.
    """
    models = [results] if isinstance(results, RowResults) else list(results)
    if explain_missing_interval(models, name) is not None:
        return None
    if name == "perplexity":
        # The exponential of the interval of the loss stays positive and is wider above than below,
        # as the distribution of perplexity is.
        loss_interval = compute_confidence_interval(models, "loss")
        if loss_interval is None:
            return None
        with np.errstate(over="ignore"):
            return float(np.exp(loss_interval[0])), float(np.exp(loss_interval[1]))
    if name in _MACRO and models[0].classified:
        return _compute_macro_interval(
            [model.classified for model in models if model.classified], name
        )
    values_MR = np.stack([compute_contributions(model, name) for model in models])
    if not np.isfinite(values_MR).all():
        return None
    is_proportion = name in SHARES and bool(np.isin(values_MR, (0.0, 1.0)).all())
    if is_proportion and len(models) == 1:
        return compute_wilson_interval(int(values_MR.sum()), values_MR.shape[1])
    pseudo_rows = _PSEUDO_ROWS if is_proportion else 0.0
    return _compute_mean_interval(values_MR, pseudo_rows=pseudo_rows, is_share=name in SHARES)


def explain_missing_interval(models: Sequence[RowResults], name: str) -> str | None:
    """Return why a metric has no confidence interval, or None if it has one.

    Reports print the sentence instead of numbers that so few rows cannot bear.

    Args:
        models: Models on the same rows.
        name: Name of the metric.
    """
    first = models[0]
    if len(first) < MIN_ROWS:
        return f"{len(first)} rows are too few for an interval (at least {MIN_ROWS} are needed)"
    if name in first.whole:
        return f"{name} has one value for all rows, not one per row"
    if name in _MACRO and first.classified:
        support_C = count_confusions(first.classified).sum(axis=1)
        predicted_C = sum(
            count_confusions(model.classified).sum(axis=0) for model in models if model.classified
        )
        # A class that is predicted but has no rows counts in the macro average, and has a support
        # of 0.
        smallest = int(support_C[(support_C > 0) | (predicted_C > 0)].min())
        if smallest < MIN_ROWS_PER_CLASS:
            return (
                f"a class has {smallest} rows, and an interval of {name} needs at least "
                f"{MIN_ROWS_PER_CLASS} rows of every class"
            )
    return None


def compute_wilson_interval(successes: int, rows: int) -> Interval:
    """Return the Wilson score interval (1927) of a proportion.

    Unlike the normal interval, it keeps its coverage for few rows and for proportions near
    0 and 1.
    """
    proportion, z2 = successes / rows, _Z**2
    center = (proportion + z2 / (2 * rows)) / (1 + z2 / rows)
    variance = proportion * (1 - proportion) / rows + z2 / (4 * rows**2)
    half = _Z / (1 + z2 / rows) * math.sqrt(variance)
    # The formula gives exactly 0 and 1 here, but rounding does not.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == rows else min(1.0, center + half)
    return low, high


def compute_mean_interval(values_R: np.ndarray) -> Interval | None:
    """Return the 95 % interval of a mean of R values.

    None for fewer than `MIN_ROWS` values, or if all values are equal.
    """
    if len(values_R) < MIN_ROWS:
        return None
    values_MR = np.asarray(values_R, dtype=float)[None, :]
    return _compute_mean_interval(values_MR, pseudo_rows=0.0, is_share=False)


def _compute_mean_interval(
    values_MR: np.ndarray, *, pseudo_rows: float, is_share: bool
) -> Interval | None:
    """Return the interval of a mean over rows and models.

    Args:
        values_MR: Contribution of each row, for each model.
        pseudo_rows: Rows to add, half of them 1 and half 0 (Agresti and Coull): for
            proportions, whose variance would else be 0 where all rows are right. 0 for
            other means.
        is_share: True if the metric lies between 0 and 1.

    Returns:
        (low, high), or None if all values are equal.
    """
    models, rows = values_MR.shape
    values_R = values_MR.mean(axis=0)
    total_rows = rows + pseudo_rows
    center = (values_R.sum() + pseudo_rows / 2) / total_rows
    deviation_R = values_R - center
    squares = (deviation_R**2).sum() + pseudo_rows / 2 * ((1 - center) ** 2 + center**2)
    row_variance = squares / (total_rows if pseudo_rows else rows - 1) / total_rows
    between_seeds = compute_seed_variance(values_MR.mean(axis=1))
    error = math.sqrt(row_variance + between_seeds)
    # Equal values say nothing about how far others may be: an interval of width 0 would claim
    # certainty.
    if error == 0.0:
        return None
    skewness = 0.0 if pseudo_rows else float((deviation_R**3).mean() / rows**2 / error**3)
    freedom = compute_degrees_of_freedom(row_variance, rows - 1, between_seeds, models - 1)
    quantile = compute_student_quantile(freedom, _UPPER)
    low = float(center - error * _compute_hall_quantile(quantile, skewness))
    high = float(center - error * _compute_hall_quantile(-quantile, skewness))
    return (max(0.0, low), min(1.0, high)) if is_share else (low, high)


def compute_student_quantile(freedom: float, probability: float) -> float:
    """Return a quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def _compute_hall_quantile(quantile: float, skewness: float) -> float:
    """Correct a quantile for the skewness of the mean.

    Source: the inverse of Hall's cubic transformation (1992).
    """
    # The formula divides by the skewness.
    if abs(skewness) < 1e-9:
        return quantile
    return float((np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1) / (skewness / 3))


def compute_seed_variance(values_M: np.ndarray) -> float:
    """Return the variance of the mean over seeds; 0 for a single model, whose spread is unknown."""
    models = len(values_M)
    return float(values_M.var(ddof=1) / models) if models > 1 else 0.0


def compute_degrees_of_freedom(
    variance: float, freedom: float, other_variance: float, other_freedom: float
) -> float:
    """Return the degrees of freedom of the sum of two variances (Satterthwaite 1946).

    The variance over two or three seeds is poorly known, so it pulls the result down and
    widens the interval.

    Args:
        variance: Variance over rows.
        freedom: Its degrees of freedom.
        other_variance: Variance over seeds; 0 for a single seed.
        other_freedom: Its degrees of freedom.
    """
    freedom, other_freedom = max(1.0, freedom), max(1.0, other_freedom)
    if other_variance == 0.0:
        return freedom
    total = variance + other_variance
    return total**2 / (variance**2 / freedom + other_variance**2 / other_freedom)


def _compute_macro_interval(models: Sequence[Classified], name: str) -> Interval:
    """Return the interval of the mean macro average of models on the same rows.

    The variance comes from the influence of each row. Pseudo-rows are added to the
    confusion matrix first, as Agresti and Coull add them to a proportion: a classifier that
    is right on every row would else have an interval of width 0.
    """
    rows = len(models[0].label_R)
    influence_R, pseudo_squares = np.zeros(rows), 0.0
    centers, values = [], []
    for model in models:
        counts_CC = count_confusions(model)
        pseudo_CC = _compute_pseudo_counts(counts_CC)
        center, influence_CC = _compute_macro_average(counts_CC + pseudo_CC, name)
        influence_R += influence_CC[model.label_R, model.predicted_R] / len(models)
        pseudo_squares += float((pseudo_CC * influence_CC**2).sum()) / len(models)
        centers.append(center)
        values.append(_compute_macro_average(counts_CC, name)[0])
    row_variance = (float((influence_R**2).sum()) + pseudo_squares) / (rows + _PSEUDO_ROWS) ** 2
    between_seeds = compute_seed_variance(np.array(values))
    freedom = compute_degrees_of_freedom(row_variance, rows - 1, between_seeds, len(models) - 1)
    half = compute_student_quantile(freedom, _UPPER) * math.sqrt(row_variance + between_seeds)
    center = float(np.mean(centers))
    return max(0.0, center - half), min(1.0, center + half)


def _compute_pseudo_counts(counts_CC: np.ndarray) -> np.ndarray:
    """Distribute the pseudo-rows over a confusion matrix.

    Half are correct, in proportion to the classes. The other half are errors, in proportion to both
    margins.
    """
    true_C = counts_CC.sum(axis=1) / counts_CC.sum()
    predicted_C = counts_CC.sum(axis=0) / counts_CC.sum()
    off_diagonal = 1 - np.eye(len(counts_CC))
    correct_CC = np.diag(true_C) * _PSEUDO_ROWS / 2
    errors_CC = np.outer(true_C, predicted_C) * off_diagonal
    if errors_CC.sum() == 0:
        errors_CC = np.outer(true_C, true_C) * off_diagonal
    if errors_CC.sum() == 0:  # a single class
        return correct_CC
    pseudo_CC: np.ndarray = correct_CC + errors_CC / errors_CC.sum() * _PSEUDO_ROWS / 2
    return pseudo_CC


def count_confusions(classified: Classified) -> np.ndarray:
    """Return how many rows of each true class (axis 0) were predicted as each class (axis 1).

    The counts (C, C) are floats, because pseudo-rows are added to them.
    """
    classes = classified.classes
    cells_R = classified.label_R * classes + classified.predicted_R
    return np.bincount(cells_R, minlength=classes**2).reshape(classes, classes).astype(float)


def _compute_macro_average(counts_CC: np.ndarray, name: str) -> tuple[float, np.ndarray]:
    """Return a macro average, and the influence (C, C) on it of a row with these classes.

    The average is over the classes that occur, as in scikit-learn with `zero_division=0`.

    Args:
        counts_CC: Rows by true class (axis 0) and predicted class (axis 1).
        name: f1, precision or recall.
    """
    rows, classes = counts_CC.sum(), len(counts_CC)
    true_C, predicted_C = counts_CC.sum(axis=1), counts_CC.sum(axis=0)
    # F1 is 2 hits / (true + predicted): all three scores are a weighted number of hits divided by a
    # number of rows, and their derivatives share one form.
    hit_weight = 2.0 if name == "f1" else 1.0
    numerator_C = hit_weight * np.diagonal(counts_CC)
    denominator_C = {"f1": true_C + predicted_C, "precision": predicted_C, "recall": true_C}[name]
    zeros_C = np.zeros(classes)
    score_C = np.divide(numerator_C, denominator_C, out=zeros_C.copy(), where=denominator_C > 0)
    weight_C = np.divide(rows, denominator_C, out=zeros_C.copy(), where=denominator_C > 0)
    influence_CC = np.diag(hit_weight * weight_C)
    if name != "precision":
        influence_CC -= (score_C * weight_C)[:, None]
    if name != "recall":
        influence_CC -= (score_C * weight_C)[None, :]
    occurring = max(1, int((true_C + predicted_C > 0).sum()))
    return float(score_C.sum() / occurring), influence_CC / occurring
