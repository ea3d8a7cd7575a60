"""A misspelled flag or field is told from the nearest one that there is."""

import argparse
import difflib


def did_you_mean(word, known):
    """Return a question that names the nearest of the known words, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the flag which is nearest to one that it does not know."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            known = [name for action in shown for name in action.option_strings]
            hints = [did_you_mean(word.split("=")[0], known) for word in unknown]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
        return parsed
