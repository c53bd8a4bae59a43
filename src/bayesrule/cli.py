"""The command line: ``bayesrule demo | table | train image | evaluate | report``.

Results go to stdout, progress to stderr. What a user can mend, recipes raise as ValueError or OSError: it becomes one
line on stderr and exit code 2. Anything else is our mistake and keeps its traceback.
"""

import sys

try:
    import tyro
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table as Grid

    from bayesrule import table
    from bayesrule.recipes import demo, folder, image
    from bayesrule.uses.report import Report, render
    from bayesrule.uses.report import table as results_table
except ModuleNotFoundError as absent:
    if (absent.name or "bayesrule").startswith("bayesrule"):
        raise
    sys.exit(f'bayesrule: the command line needs {absent.name}, which is not installed: pip install "bayesrule[cli]"')
