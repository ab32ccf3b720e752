"""Sizes that matrix products ask for, on what each rank holds: rows of a multiple of some length, a number of experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from parallel.config import ParallelConfig
from parallel.errors import ConfigError

# `torch.nn.functional.grouped_mm` takes rows of a multiple of this length, on CPU and on GPUs.
ROW_BYTES = 16
# `torch.nn.functional.grouped_mm` on GPUs gives every group a thread of one block, and refuses 1,024 (torch 2.11 to 2.15).
MOST_GROUPS = 1023
# A size of `ModelConfig` with the parallel dimension whose ranks share it; None for a size that is whole on each.
Cut = tuple[str, str | None]


def refuse_unaligned(
    model: Any,
    parallel: ParallelConfig,
    keys: Mapping[str, str],
    cuts: Sequence[Cut],
    unit: int,
    who: str,
    otherwise: str,
) -> None:
    """Refuse a size whose part on a rank is not a multiple of a unit.

    Args:
        model: a `ModelConfig`.
        parallel: sizes that cut matrices.
        keys: where the sizes of the layout are set, by name.
        cuts: the sizes to look at.
        unit: in elements.
        who: what needs it, for the message.
        otherwise: another remedy than the next larger size.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    for name, by in cuts:
        size, ranks = getattr(model, name), getattr(parallel, by) if by else 1
        if size is not None and size % (unit * ranks):
            near = -(-size // (unit * ranks)) * unit * ranks
            share = f" / {keys[by]}={ranks}" if by and ranks > 1 else ""
            raise ConfigError(
                f"model.{name}={size}{share} is not a multiple of {unit}, which {who} needs: use model.{name}={near}, or "
                f"{otherwise}"
            )


def check_grouped(model: Any, parallel: ParallelConfig, precision: str, keys: Mapping[str, str]) -> None:
    """Refuse what our grouped experts cannot multiply; they may be what `model.experts=auto` becomes.

    Args:
        model: a `ModelConfig`.
        parallel: sizes that cut matrices.
        precision: of the run.
        keys: where the sizes of the layout are set, by name.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if not model.num_experts or model.experts not in ("auto", "grouped"):
        return
    unit = ROW_BYTES // (2 if precision == "bf16" else 4)
    cuts: list[Cut] = [("hidden_size", None), ("expert_ffn_hidden_size", "expert_tensor")]
    refuse_unaligned(model, parallel, keys, cuts, unit, f"a grouped product in {precision}", "model.experts=sequential")


def check_groups(model: Any, num_experts: int, parallel: ParallelConfig, stage: int) -> None:
    """Refuse more experts on a rank than one grouped product on a GPU takes.

    Args:
        model: a `ModelConfig`.
        num_experts: of the stage.
        parallel: layout of the stage.
        stage: its number, for the message.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if not num_experts or model.experts not in ("auto", "grouped"):
        return
    local = num_experts // parallel.expert
    if local > MOST_GROUPS:
        raise ConfigError(
            f"stage {stage} has {num_experts} experts / parallel.expert={parallel.expert} = {local} on a rank, and a "
            f"grouped product on a GPU takes at most {MOST_GROUPS}: use a larger parallel.expert, or "
            "model.experts=sequential"
        )
