"""Evaluate a tokenizer: ``python eval.py --config=configs/eval_default.py --checkpoint=runs/quickstart``."""

import functools
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from tokenizers.train import commandline

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; default configs/eval_default.py.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run of train.py, a saved folder, or an official weight file.")
_OUT = flags.DEFINE_string("out", None, "Folder of the report; default evaluation/ in the run, or evaluation_<file>.")
flags.mark_flag_as_required("checkpoint")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set with --config.<field>=<value>.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries below log every file they touch
    if "budget" in _CONFIG.value:  # configs/generation_blackbox.py
        from tokenizers.generation import blackbox as evaluation
    else:
        from tokenizers.evaluate import session as evaluation
    try:
        evaluation.evaluate_checkpoint(_CHECKPOINT.value, _CONFIG.value, _OUT.value)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(commandline.parse, default="configs/eval_default.py"))
