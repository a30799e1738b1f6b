"""Train a tokenizer: ``python train.py --config=configs/quickstart.py``.

Any field of the config can be set: ``--config.optimizer.lr=1e-4``. The same command goes on where a run stopped.
``--dry_run --mesh=data:8,fsdp:8`` compiles its step for a mesh of devices that need not be there. Scripts that start it
on several hosts are in launch/.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

import tokenizers

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with an optional :argument.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<name of the config>.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the step on virtual devices, and say its memory and traffic.")
_MESH = flags.DEFINE_string("mesh", "", "In place of config.mesh: data:8,fsdp:8,context:1,split:height.")
_STOPPED = flags.DEFINE_integer("stopped_status", 0, "Exit status of a run that was told to stop, for schedulers.")
flags.mark_flag_as_required("config")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set with --config.<field>=<value>.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries below log every file they touch
    from configs import eval_default
    from tokenizers.evaluate import session
    from tokenizers.train import loop

    config = _CONFIG.value
    if _DRY_RUN.value or _MESH.value:
        _change_mesh(config)
    if _DRY_RUN.value:
        return _dry_run(config)
    workdir = _WORKDIR.value or f"runs/{_config_name()}"
    try:
        finished = loop.run(config, workdir)
        if finished and "evaluation" in config and config.evaluation.final_report:
            evaluation = eval_default.get_config()
            evaluation.mesh = config.mesh
            session.evaluate_checkpoint(workdir, evaluation)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    return 0 if finished else _STOPPED.value


def _change_mesh(config):
    from tokenizers.train import dryrun

    try:
        config.mesh.update(dryrun.mesh_fields(_MESH.value))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _dry_run(config):
    from tokenizers.parallel import platform
    from tokenizers.train import dryrun

    platform.pretend(dryrun.devices(config.mesh))
    try:
        dryrun.report(config, lambda line: print(line, flush=True))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parse_flags(argv):
    _check_package()
    from tokenizers.train import commandline

    return commandline.parse(argv)


def _config_name() -> str:
    """``configs/vqgan.py:smoke`` -> ``vqgan_smoke``."""
    filename = flags.FLAGS["config"].config_filename
    path, _, argument = filename.partition(":")
    return "_".join(filter(None, (pathlib.Path(path).stem, argument)))


def _check_package() -> None:
    """Another package is called tokenizers too; say so instead of failing in it."""
    here = pathlib.Path(__file__).resolve().parent
    if here not in pathlib.Path(tokenizers.__file__).resolve().parents:
        sys.exit(
            f"error: `import tokenizers` found {tokenizers.__file__}, not the package beside this file. "
            f"Start from {here}, or put it first on PYTHONPATH."
        )


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
