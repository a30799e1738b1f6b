"""Runs a scaling study: ``python -m tokenizers.scaling --config=configs/scaling_shapes.py --workdir=runs/scaling``.

The same command goes on where it stopped, and tries again what failed. ``--plot_only`` draws what there is.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from ..train import commandline
from ..train.config import to_dict
from . import curves, study

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file configs/scaling_*.py, with an optional :argument.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study; its points are folders in it.")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Run nothing: curves through the points that are there.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set with --config.<field>=<value>.")
    logging.set_verbosity(logging.WARNING)
    config, folder = to_dict(_CONFIG.value), _WORKDIR.value
    try:
        collect = study.gather if _PLOT_ONLY.value else study.run
        records = collect(config, folder)
        found = curves.write(records, config, folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(curves.table(records, config))
    print(f"\n{curves.laws(found, config)}\n\nreport: {folder}/report.html")


if __name__ == "__main__":
    app.run(main, flags_parser=commandline.parse)
