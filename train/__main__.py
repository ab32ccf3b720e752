"""`python -m train [Hydra overrides]`: start or resume a run. Under torchrun, one process per rank.

Settings and corpora are checked on every rank before any process group or device is touched; every error of a user is
one line and a non-zero exit on every rank.
"""

import faulthandler
import os
import sys

from parallel.errors import ConfigError, CoppiceError
from train.settings import compose_settings, load_settings, register_schema, to_settings

_HYDRA_FLAGS = (
    "--help",
    "-h",
    "--hydra-help",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--package",
    "-p",
    "--resolve",
    "--version",
)


def _let_hydra_answer() -> None:
    """`--help`, `--cfg job` and the like: Hydra's own answers about the configuration."""
    import hydra
    from omegaconf import DictConfig

    register_schema()

    @hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")
    def show(config: DictConfig) -> None:
        del config

    show()


def run_job(overrides: list[str]) -> str:
    """Run one job to its end.

    Args:
        overrides: Hydra overrides.

    Returns:
        Why the run ended: finished, stop_at_step or requested.

    Raises:
        CoppiceError: for anything a user can mend.
    """
    settings = load_settings(overrides)
    # Before anything else of mcore is imported: it warns at import of what is not installed.
    from parallel.compat import prepare_megatron

    prepare_megatron()
    from train.job import run_settings

    return run_settings(settings)


def main() -> int:
    """Parse the command line, run, and turn errors into one line and an exit code."""
    faulthandler.enable()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from train.signals import follow_parent

        follow_parent()
    arguments = sys.argv[1:]
    try:
        overrides = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
        for flag in ("-m", "--multirun"):
            if flag in arguments:
                # Each rank would expand the sweep by itself, inside one job.
                raise ConfigError(
                    f"{flag}: a sweep is started by the launcher: python -m launch local --processes N -m -- OVERRIDES, "
                    "or python -m launch slurm ... -m -- OVERRIDES"
                )
        if any(a.split("=")[0] in _HYDRA_FLAGS for a in arguments):
            # Hydra's own messages about a wrong key run over many lines; ours come first.
            to_settings(compose_settings(overrides))
            _let_hydra_answer()
            return 0
        run_job(arguments)
    except CoppiceError as e:
        return e.tell()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
