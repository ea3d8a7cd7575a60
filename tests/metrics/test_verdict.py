"""What an evaluation says in sentences, and what its words mean."""

import pytest

from ddp.metrics.verdict import TERMS, terms_of, verdict, words_of

NATS = {"recipe": {"unit": "nats"}, "entropy": None}
BITS = {"recipe": {"unit": "bits/dim"}, "entropy": None}


def estimate(value, error=0.1):
    return {"value": value, "error": error, "interval": [value - 2 * error, value + 2 * error]}


def measure(samples, real=None, ratio=None):
    return {
        "samples": estimate(samples),
        "real_vs_real": real and estimate(real),
        "relative_to_real": ratio and estimate(ratio),
    }


def test_distance_is_of_the_most_telling_space_that_has_a_ratio():
    pixels = {"sliced_wasserstein": measure(3, 1, 3)}
    subject = {
        "pixels": pixels,
        "classifier": {"fd": measure(2, 0), "sliced_wasserstein": measure(2, 1, 2)},
    }
    (line,) = verdict(subject, BITS)
    assert line == (
        "The distance of the samples to real items (sliced_wasserstein, classifier) is 2.00 "
        "[1.80, 2.20] times that of other real items."
    )
    (line,) = verdict({"pixels": pixels, "classifier": {"fd": measure(2, 1, 9)}}, BITS)
    assert "(sliced_wasserstein, pixels) is 3.00" in line  # the next space that has a ratio
    (line,) = verdict({"points": {"wasserstein2": measure(1, 1, 1.1)}}, BITS)
    assert line.endswith("times that of other real items, which cannot be told from 1.")


def test_precision_stands_beside_that_of_real_items():
    subject = {"points": {"precision": measure(0.5, 0.75), "recall": measure(0.25)}}
    (line,) = verdict(subject, NATS)
    assert line.startswith("Precision 0.50 (real 0.75), the share of samples that look right; ")
    assert "recall 0.25, the share of the data" in line


@pytest.mark.parametrize(
    ("near", "error", "copies", "says"),
    [
        (0.02, 0.01, 0, ["no more than by chance"]),
        (0.2, 0.01, 0, ["look at the closest pairs"]),
        (0.06, 0.01, 0, ["that cannot be told from chance"]),
        (0.2, 0.1, 0, ["too few items to tell"]),
        (0.02, 0.01, 3, ["3 samples are exact copies", "that cannot be told from chance"]),
        (1.0, 0.0, 7, ["7 samples are exact copies", "look at the closest pairs"]),
    ],
)
def test_memorization(near, error, copies, says):
    subject = {"memorization": {"near_duplicates": estimate(near, error), "copies": copies}}
    lines = verdict(subject, BITS)
    assert len(lines) == len(says)
    assert all(words in line for words, line in zip(says, lines, strict=True))
    assert verdict({"memorization": {"copies": 3}}, BITS) == []  # too few items


def test_likelihood():
    subject = {
        "vlb": {"discrete": {"total": estimate(1.5)}},
        "ode_nll": {"uniform": {"total": estimate(1.25)}},
    }
    first, second = verdict(subject, BITS)
    assert first == (
        "VLB (discrete): 1.500 ± 0.100 bits/dim; a lossless code made of the model needs no more "
        "for a test item."
    )
    assert second == "ODE NLL (uniform): 1.250 ± 0.100 bits/dim."
    (line,) = verdict({"vlb": {"discrete": {"total": estimate(71)}}}, BITS)
    assert "more than the 8 bits of a pixel itself" in line
    (line,) = verdict(
        {"ode_nll": {"density": {"total": estimate(71)}}}, NATS | {"entropy": estimate(3)}
    )
    assert line == "ODE NLL (density): 71.000 ± 0.100 nats; a perfect model has 3.000."


def test_terms_are_those_that_the_evaluation_uses():
    evaluation = {
        "subjects": [{"name": "kid", "about": {"vlb": 1}, "pixels": {"fd": measure(1, 1, 1)}}]
    }
    names = [*terms_of(words_of(evaluation))]
    assert {"pixels", "fd", "real vs real"} <= {*names}
    assert not {"kid", "vlb", "classifier"} & {*names}
    assert all(text.endswith(".") for text in TERMS.values())
