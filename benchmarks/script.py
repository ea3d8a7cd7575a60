"""What every benchmark imports first: it finds ddp, and ends it with an exit code and a line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from ddp.config import verdict


def exit_code(script, main, *arguments):
    """Run main(*arguments) -> its exit code, 2 for a wrong flag and 1 for a failed run; then a line
    says why."""
    try:
        return main(*arguments) or 0
    except (Exception, KeyboardInterrupt) as error:
        code, line = verdict(error)
        print(f"{script}: {line}", file=sys.stderr)
        return code
