"""A misspelled flag or field is told from the nearest one that there is."""

import difflib


def did_you_mean(word, known):
    """Return a question that names the nearest of the known words, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""
