"""What an evaluation says, in sentences, and what its words mean.

Both are of an evaluation as JSON: an estimate is {value, error, interval}.
"""

from ddp.io.tables import interval_text
from ddp.metrics.comparison import flat_results
from ddp.metrics.sample_metrics import CLOSE

SPACES = ("inception", "classifier", "values", "points", "filters", "pixels")  # most telling first
# distances, not squared as fd is; the first that was measured is told
DISTANCES = ("wasserstein2", "sliced_wasserstein")
LIKELIHOODS = {"vlb": "VLB", "ode_nll": "ODE NLL"}
WIDEST = 0.25  # of an interval of a share that tells anything
PIXEL_BITS = 8  # of a pixel as it is, without a model

TERMS = {
    "[low, high]": "a 95% interval. Of one model it holds the samples alone: the same model would "
    "give such figures again. Of a group of trainings it holds other seeds, too.",
    "±": "a standard error: about two thirds of repetitions lie so near.",
    "real vs real": "the figure of real items in the place of samples. No model does better but "
    "by chance, or by copying.",
    "relative to real": "the figure of the samples over that of real items; 1 is as good. "
    "Where that of real items is about 0 there is none: it would be chance.",
    "classifier": "distances are between the features of a small classifier of this dataset, "
    "trained on half of its training items; items of one kind lie near each other.",
    "filters": "distances are between the outputs of fixed random filters, which know textures.",
    "pixels": "distances are between the pixels themselves.",
    "inception": "distances are between the features of Inception, as in published FIDs.",
    "values": "distances are between the standardized numbers.",
    "points": "distances are between the points themselves.",
    "fd": "Frechet distance: between two normal distributions with the means and covariances of "
    "samples and of real items. In Inception's features it is the FID.",
    "fd_inf": "the same, extrapolated to infinitely many samples: fd is too large with few.",
    "kid": "kernel distance (KID): like fd, without its bias; below 0 by chance.",
    "wasserstein2": "2-Wasserstein distance: how far the samples must be moved to become the real "
    "items, by the best assignment, root mean square.",
    "mmd_rbf": "squared maximum mean discrepancy with Gaussian kernels; 0 for equal distributions.",
    "histogram_kl": "Kullback-Leibler divergence between histograms, in nats.",
    "sliced_wasserstein": "the Wasserstein distance of projections on random lines, on average.",
    "precision": "the fraction of samples that lie among real items: how many look right.",
    "recall": "the fraction of real items that lie among samples: how much is covered.",
    "density": "like precision, counting how many real items a sample lies among; best as of real "
    "items, more is crowding where these are dense.",
    "coverage": "the fraction of real items that have a sample near them.",
    "class_tv": "total variation between the frequencies of the classes: the share of samples that "
    "would have to be of another class.",
    "confident": "the fraction of items whose class the classifier gives more than 90%.",
    "label_accuracy": "the fraction of samples that the classifier calls what they were made for.",
    "near_duplicates": "the fraction of samples nearer to a training item than 95% of held-out "
    "items are; 0.05 for new items, more where the model has learned items by heart.",
    "nn_distance_ratio": "the median distance of samples to the nearest training item, over that "
    "of held-out items.",
    "saturated": "the fraction of pixels that are black or white, 0 or 255.",
    "loss": "test loss by noise level. log-SNR is the log of signal to noise, at the left noise "
    "alone; x0, eps and v are units: of the data, of the noise, and of their mixture.",
    "vlb": "variational lower bound (negative): how well the model predicts test items; discrete "
    "with the steps of training, continuous with infinitely many.",
    "monte_carlo": "the part of the error that more noise levels (vlb_samples) would lower.",
    "ode_nll": "negative log-likelihood along the probability-flow ODE. A pixel needs noise before "
    "it has a density: uniform noise, or the model's own.",
    "importance_weighted": "a tighter bound, of several such noises.",
    "below_vlb": "how far it is below the VLB of the same items.",
    "gap": "what the model needs beyond the entropy of the data; 0 for a perfect model.",
}


def words_of(evaluation):
    """The words that an evaluation uses, a set."""
    words = {"[low, high]", "±", "real vs real", "relative to real"}
    for subject in evaluation["subjects"]:
        for keys in flat_results(subject):
            words.update(keys)
    return words


def terms_of(words):
    """Those of the words that have a meaning here: term -> its meaning."""
    return {term: text for term, text in TERMS.items() if term in words}


def verdict(subject, evaluation):
    """What the figures of a subject say, in sentences, a list."""
    return [
        *distance_sentences(subject),
        *memorization_sentences(subject),
        *likelihood_sentences(subject, evaluation),
    ]


def distance_sentences(subject):
    """How near the samples are to real items, in the most telling feature space."""
    spaces = [name for name in SPACES if name in subject]
    if not spaces:
        return []
    lines = []
    for space in spaces:
        ratios = {name: subject[space].get(name, {}).get("relative_to_real") for name in DISTANCES}
        name = next((name for name in DISTANCES if ratios[name]), None)
        if name:
            low, high = ratios[name]["interval"]
            as_near = ", which cannot be told from 1" if low <= 1 <= high else ""
            lines.append(
                f"The distance of the samples to real items ({name}, {space}) is "
                f"{interval_text(ratios[name])} times that of other real items{as_near}."
            )
            break
    results = subject[spaces[0]]
    if "precision" in results and "recall" in results:
        precision, recall = (with_real(results[name]) for name in ("precision", "recall"))
        lines.append(
            f"Precision {precision}, the share of samples that look right; recall {recall}, the "
            "share of the data that they cover."
        )
    return lines


def with_real(cells):
    """A proportion of samples as text, with that of real items if it was measured."""
    real = cells["real_vs_real"]
    return f"{cells['samples']['value']:.2f}" + (f" (real {real['value']:.2f})" if real else "")


def memorization_sentences(subject):
    """Whether samples are copies of training items."""
    results = subject.get("memorization", {})
    near = results.get("near_duplicates")
    if not near:
        return []
    lines = []
    if results["copies"]:
        lines.append(f"{results['copies']:,} samples are exact copies of training items.")
    low, high = near["interval"]
    share = (
        f"{near['value']:.0%} [{low:.0%}, {high:.0%}] of samples lie as near to a training item "
    )
    share += f"as {CLOSE:.0%} of new items do"
    meaning = "that cannot be told from chance"
    if high - low > WIDEST:
        meaning = "too few items to tell"
    if low > CLOSE:
        meaning = "more than by chance; look at the closest pairs"
    elif high <= CLOSE and not results["copies"]:
        meaning = "no more than by chance"
    return [*lines, f"{share}: {meaning}."]


def likelihood_sentences(subject, evaluation):
    """How well test items are predicted."""
    unit = evaluation["recipe"]["unit"]
    lines = []
    for name, title in LIKELIHOODS.items():
        kind, terms = next(iter(subject.get(name, {}).items()), (None, {}))
        total = terms.get("total")
        if not total:
            continue
        error = "" if total["error"] is None else f" ± {total['error']:.3f}"
        line = f"{title} ({kind}): {total['value']:.3f}{error} {unit}"
        if unit == "bits/dim" and total["value"] > PIXEL_BITS:
            line += (
                f": more than the {PIXEL_BITS} bits of a pixel itself, so it is no density model"
            )
        elif unit == "bits/dim" and name == "vlb":
            line += "; a lossless code made of the model needs no more for a test item"
        if evaluation["entropy"]:
            line += f"; a perfect model has {evaluation['entropy']['value']:.3f}"
        lines.append(f"{line}.")
    return lines
