"""tinyld: teach a small masked diffusion language model to label or write your texts.

import tinyld

run = tinyld.finetune([("loved it", "good"), ...], out="runs/mine")  # or a task: tinyld.finetune("reviews")
run = tinyld.load("runs/mine")
run.predict(["what a film"])[0]["label"]
tinyld.load("base").write("the film was {answer} .")  # base and small come with tinyld
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from tinyld.errors import TinyldError, UsageError

# Where another program holds a core, threads wait in vain for the one that shares it, each time for as many turns as
# libgomp counts: beside a busy core a fine-tuning takes 37 times as long by its own 300,000, 3.4 by 5,000; alone it
# takes as long by either. It reads this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

if TYPE_CHECKING:
    from tinyld.from_python import finetune
    from tinyld.predict import Run, load

__version__ = "0.1.0"
__all__ = ["Run", "TinyldError", "UsageError", "finetune", "load"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """`load`, `finetune` and `Run` bring torch with them, and come when they are first asked for."""
    home = {"load": "predict", "Run": "predict", "finetune": "from_python"}
    if name not in home:
        raise AttributeError(f"module 'tinyld' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tinyld.{home[name]}"), name)
