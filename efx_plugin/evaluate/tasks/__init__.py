"""Tasks that are scored by lm-eval's harness: our own, the paper's, and every other that lm-eval knows.

Our tasks lie here as task files: `efx_*.yaml`, multiple choice over files of questions that the user brings. The names
of lm-eval's tasks are taken as they are. lm-eval is imported when something is scored.
"""

from efx_plugin.evaluate.tasks.harness import Score, check, score

__all__ = ["Score", "check", "score"]
