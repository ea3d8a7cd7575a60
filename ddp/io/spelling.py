"""A misspelled flag, field or value is told from the nearest one that there is."""

import difflib


def did_you_mean(word, known):
    """Return a question that names the nearest of the known words, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def none_of(name, value, known):
    """Return what is wrong with a value that is none of the known ones, as a line."""
    return f"{name}={value}: expected some of {', '.join(known)}{did_you_mean(value, known)}"
