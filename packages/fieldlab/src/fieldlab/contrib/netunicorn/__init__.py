"""netunicorn's tasks, graphs and flags on fieldlab's executor, unchanged.

::

    from fieldlab.contrib import netunicorn as nu

    results = fl.run(nu.from_graph(pipeline, install=False))
    nu.result_of(dag, results)                      # what netunicorn's executor would have given

Needs ``pip install 'fieldlab[netunicorn]'``. docs/netunicorn.md has every rule side by side.
"""

from fieldlab.contrib.netunicorn.graph import from_graph
from fieldlab.contrib.netunicorn.outcomes import get_flag, result_of, set_flag
from fieldlab.contrib.netunicorn.tasks import from_task

__all__ = ["from_graph", "from_task", "get_flag", "result_of", "set_flag"]
